// One instruction set: this file is compiled once for each, with RANKTOWER_LEVEL naming it. Nothing from the standard
// library that could be instantiated here is used: the linker keeps one copy of it, and that would be anybody's.

#include "level.h"

namespace ranktower::RANKTOWER_LEVEL {
// 2^f for f within -1/2 to 1/2, least relative error (7.5e-8), fitted for this purpose
constexpr float exp2_0 = 1.000000072f, exp2_1 = 0.6931469671f, exp2_2 = 0.2402211972f;
constexpr float exp2_3 = 0.05550713274f, exp2_4 = 0.009675541333f, exp2_5 = 0.001327647187f;
}  // namespace ranktower::RANKTOWER_LEVEL

#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif

#include "cross_attention.h"
#include "differentiate.h"
#include "maxsim.h"

namespace ranktower {
namespace RANKTOWER_LEVEL {
namespace {

// Records under way, some 100 lines. They are prefetched into the second cache, which has three times as many places
// for lines under way as the first: touching 5,000 records of 144 octets takes 85 us so, 100 to 125 us the other way.
INLINE size_t ahead_of(const Shape& s) {
    const size_t lines = s.stride / line + 1;
    return lines >= 24 ? 4 : 96 / lines;
}

INLINE void add_bias(const Shape& s, const uint8_t* record, float* score) {
    if (!s.bias) return;
    float bias;
    __builtin_memcpy(&bias, record + s.bias_at, 4);
    *score += bias;
}

template <int H, int D, class Value>
void score_maxsim(const Shape& s, const uint8_t* user, const Records& from, const int32_t* rows, size_t count,
                  size_t soon, float* scores) {
    const size_t ahead = ahead_of(s);
    for (size_t i = 0; i < ahead && i < soon; ++i) prefetch_octets(from.at(rows[i]), 0, s.bytes);
    for (size_t i = 0; i < count; ++i) {
        if (i + ahead < soon) prefetch_octets(from.at(rows[i + ahead]), 0, s.bytes);
        const uint8_t* record = from.at(rows[i]);
        scores[i] = maxsim<H, D>(s, user, (const Value*)record);
        add_bias(s, record, scores + i);
    }
}

template <int H, int D, class Value, int blocks>
void score_cross(const Shape& s, const uint8_t* user, const Records& from, const int32_t* rows, size_t count,
                 size_t soon, float* scores) {
    const Cross<H, D, Value, blocks> cross = make_cross<H, D, Value, blocks>(s, user);
    constexpr size_t batch = batch_of<blocks>;
    const uint8_t *records[batch], *next[batch];
    const auto records_from = [&](size_t start, const uint8_t** to) {  // none left: the last one again, which is here
        for (size_t i = 0; i < batch; ++i) to[i] = from.at(rows[start + i < soon ? start + i : soon - 1]);
    };
    if (count) records_from(0, next);
    for (size_t i = 0; i < batch && i < count; ++i) prefetch_octets(next[i], 0, s.bytes);
    for (size_t start = 0; start < count; start += batch) {
        const size_t n = count - start < batch ? count - start : batch;
        for (size_t i = 0; i < batch; ++i) records[i] = next[i];
        records_from(start + n, next);
        cross.score(records, next, int(n), scores + start);
        for (size_t i = 0; i < n; ++i) add_bias(s, records[i], scores + start + i);
    }
}

using Score = void (*)(const Shape&, const uint8_t*, const Records&, const int32_t*, size_t, size_t, float*);

template <int H, int D, class Value>
Score of_kind(const Shape& s) {
    if (s.kind == Kind::maxsim) return score_maxsim<H, D, Value>;
    const int blocks = blocks_of(s);
    if (blocks == 1) return score_cross<H, D, Value, 1>;
    if (blocks == 2 && D > 0) return score_cross<H, D, Value, 2>;
    return score_cross<H, 0, Value, most_blocks>;
}

template <int H, int D>
Score of_dtype(const Shape& s) {
    return s.dtype == Dtype::f32   ? of_kind<H, D, float>(s)
           : s.dtype == Dtype::f16 ? of_kind<H, D, uint16_t>(s)
                                   : of_kind<H, D, int8_t>(s);
}

// The usual dims are compiled in. With sanitizers, whose every check is one more thing to compile, 4 heads of 32 alone.
#if defined(RANKTOWER_SANITIZE)
constexpr bool compiled_in(int heads, int dim) { return heads == 4 && dim == 32; }
#elif defined(__AVX2__)
constexpr bool compiled_in(int heads, int dim) { return heads <= 8 && (dim == 32 || dim == 64); }
#else
constexpr bool compiled_in(int, int) { return false; }
#endif

template <int H>
Score of_dim(const Shape& s) {
    if constexpr (compiled_in(H, 32))
        if (s.dim == 32) return of_dtype<H, 32>(s);
    if constexpr (compiled_in(H, 64))
        if (s.dim == 64) return of_dtype<H, 64>(s);
    return of_dtype<H, 0>(s);
}

void score(const Shape& s, const void* prepared, const Records& from, const int32_t* rows, size_t count, size_t soon,
           float* scores) {
    const Score all = s.heads == 1   ? of_dim<1>(s)
                      : s.heads == 2 ? of_dim<2>(s)
                      : s.heads == 4 ? of_dim<4>(s)
                      : s.heads == 8 ? of_dim<8>(s)
                                     : of_dim<16>(s);
    all(s, (const uint8_t*)prepared, from, rows, count, soon, scores);
}

uint64_t touch(const Shape& s, const Records& from, const int32_t* rows, size_t count) {
    const size_t ahead = ahead_of(s);
    uint64_t sum = 0;
    for (size_t i = 0; i < count; ++i) {
        if (i + ahead < count) prefetch_octets(from.at(rows[i + ahead]), 0, s.bytes);
        const uint8_t* record = from.at(rows[i]);
        for (size_t at = 0; at < s.bytes; at += line) sum += record[at];
        sum += record[s.bytes - 1];
    }
    return sum;
}

size_t prepared_bytes(const Shape& s) {
    return s.kind == Kind::maxsim ? blocks_of(s) * maxsim_block_bytes(size_of(s), s.dtype == Dtype::int8)
                                  : cross_layout(size_of(s), blocks_of(s), s.dtype == Dtype::int8).bytes;
}

void prepare(const Shape& s, const float* user, void* prepared) {
    if (s.kind == Kind::maxsim) maxsim_prepare(s, user, (uint8_t*)prepared);
    else cross_prepare(s, user, (uint8_t*)prepared);
}

bool supported() {
#if defined(__AVX512F__)
    const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(__AVX512VNNI__)
    return has && __builtin_cpu_supports("avx512vnni");
#else
    return has;
#endif
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return true;
#endif
}

}  // namespace
}  // namespace RANKTOWER_LEVEL

#define NAME_OF_(level) level##_level
#define NAME_OF(level) NAME_OF_(level)
extern const Level NAME_OF(RANKTOWER_LEVEL);
const Level NAME_OF(RANKTOWER_LEVEL) = {
    RANKTOWER_LEVEL_NAME,        RANKTOWER_LEVEL::supported,   RANKTOWER_LEVEL::prepared_bytes,
    RANKTOWER_LEVEL::prepare,    RANKTOWER_LEVEL::score,       RANKTOWER_LEVEL::touch,
    RANKTOWER_LEVEL::lists_room, RANKTOWER_LEVEL::score_lists, RANKTOWER_LEVEL::differentiate_lists};

}  // namespace ranktower
