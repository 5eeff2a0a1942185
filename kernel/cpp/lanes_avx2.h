// Sixteen floats as two 256-bit registers: quarters 0 and 1, quarters 2 and 3. Needs AVX2, FMA and F16C.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define INLINE inline __attribute__((always_inline))

namespace ranktower::RANKTOWER_LEVEL {

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};

INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE F load(const uint16_t* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 8)))};
}
INLINE F load(const int8_t* from) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8))))};
}
INLINE F load_scales(uint64_t four) {  // four halves in every quarter
    const __m128 quad = _mm_cvtph_ps(_mm_cvtsi64_si128((long long)four));
    return {_mm256_set_m128(quad, quad), _mm256_set_m128(quad, quad)};
}
INLINE F load_quad(const float* from) {
    const __m256 x = _mm256_broadcast_ps((const __m128*)from);
    return {x, x};
}
INLINE F load_pair(const float* from) {
    return {_mm256_broadcast_ps((const __m128*)from), _mm256_broadcast_ps((const __m128*)(from + 4))};
}
INLINE void store(float* to, F x) { _mm256_storeu_ps(to, x.a), _mm256_storeu_ps(to + 8, x.b); }

INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE F where_equal(F x, F y, F z) {  // else 0
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), z.a),
            _mm256_and_ps(_mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ), z.b)};
}

INLINE F reciprocal(F x) {  // 12 bits, and one step of Newton for the rest
    const F r = {_mm256_rcp_ps(x.a), _mm256_rcp_ps(x.b)};
    return mul(r, sub(broadcast(2.0f), mul(x, r)));
}
INLINE F inverse_root(F x) {
    const F r = {_mm256_rsqrt_ps(x.a), _mm256_rsqrt_ps(x.b)};
    return mul(r, sub(broadcast(1.5f), mul(mul(x, r), mul(r, broadcast(0.5f)))));
}
INLINE __m256 scaled(__m256 y, __m256 whole) {  // y * 2^whole, 0 below the normal range
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    const __m256 normal = _mm256_cmp_ps(whole, _mm256_set1_ps(-126.0f), _CMP_GE_OQ);
    return _mm256_mul_ps(y, _mm256_and_ps(_mm256_castsi256_ps(bits), normal));
}
INLINE F power_of_two(F x) {  // 2^x for x <= 0
    x = max(x, broadcast(-1000.0f));
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const F whole = {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)}, f = sub(x, whole);
    F y = fma(broadcast(exp2_5), f, broadcast(exp2_4));
    y = fma(y, f, broadcast(exp2_3));
    y = fma(y, f, broadcast(exp2_2));
    y = fma(y, f, broadcast(exp2_1));
    y = fma(y, f, broadcast(exp2_0));
    return {scaled(y.a, whole.a), scaled(y.b, whole.b)};
}

// --- within quarters

template <int lane>
INLINE F lane_of_quarter(F x) {
    return {_mm256_permute_ps(x.a, lane * 0x55), _mm256_permute_ps(x.b, lane * 0x55)};
}
INLINE F swap_by_two(F x) { return {_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e)}; }
INLINE F swap_by_one(F x) { return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)}; }
INLINE F sum_lanes(F x) {
    x = add(x, swap_by_two(x));
    return add(x, swap_by_one(x));
}
INLINE F max_lanes(F x) {
    x = max(x, swap_by_two(x));
    return max(x, swap_by_one(x));
}
INLINE __m256 sum_transposed(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}
INLINE F sum_transposed(F a, F b, F c, F d) {  // lane p of quarter t: the sum of quarter t of the p-th
    return {sum_transposed(a.a, b.a, c.a, d.a), sum_transposed(a.b, b.b, c.b, d.b)};
}

// --- across quarters

INLINE __m256 swapped(__m256 x) { return _mm256_permute2f128_ps(x, x, 1); }
INLINE F add_quarters(F x) {
    const __m256 y = _mm256_add_ps(x.a, x.b), sum = _mm256_add_ps(y, swapped(y));
    return {sum, sum};
}
INLINE F add_halves(F x) {  // quarters 0+2, 1+3, 0+2, 1+3
    const __m256 y = _mm256_add_ps(x.a, x.b);
    return {y, y};
}
INLINE F max_quarters(F x) {
    const __m256 y = _mm256_max_ps(x.a, x.b), most = _mm256_max_ps(y, swapped(y));
    return {most, most};
}
INLINE F transpose(F x) {  // lane p of quarter t <-> lane t of quarter p
    __m128 q0 = _mm256_castps256_ps128(x.a), q1 = _mm256_extractf128_ps(x.a, 1);
    __m128 q2 = _mm256_castps256_ps128(x.b), q3 = _mm256_extractf128_ps(x.b, 1);
    _MM_TRANSPOSE4_PS(q0, q1, q2, q3);
    return {_mm256_set_m128(q1, q0), _mm256_set_m128(q3, q2)};
}
INLINE float first(F x) { return _mm256_cvtss_f32(x.a); }
INLINE F zip(__m256 x, __m256 y) {
    const __m256 low = _mm256_unpacklo_ps(x, y), high = _mm256_unpackhi_ps(x, y);
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
INLINE F zip_low(F x, F y) { return zip(x.a, y.a); }   // x0 y0 x1 y1 ... x7 y7
INLINE F zip_high(F x, F y) { return zip(x.b, y.b); }  // x8 y8 ... x15 y15

// --- int8 dot products: 16 quads of an item with the int16 quads of a user

struct Dot {
    __m256i sum[4];  // of quarter t: two sums for each of its 4 quads
};
constexpr size_t user_quads_bytes = 128;  // of 16 quads

INLINE void store_user_quads(uint8_t* to, const int16_t* quads) { __builtin_memcpy(to, quads, 128); }
INLINE void dot_start(Dot& dot, const int32_t*) {
    for (auto& sum : dot.sum) sum = _mm256_setzero_si256();
}
INLINE void dot_step(Dot& dot, const int8_t* item, const uint8_t* user, int quarters) {
    for (int t = 0; t < quarters; ++t) {
        const __m256i octets = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(item + 16 * t)));
        const __m256i products = _mm256_madd_epi16(octets, _mm256_loadu_si256((const __m256i*)(user + 32 * t)));
        dot.sum[t] = _mm256_add_epi32(dot.sum[t], products);
    }
}
INLINE I dot_finish(const Dot& dot) {
    const __m256i a = _mm256_hadd_epi32(dot.sum[0], dot.sum[1]), b = _mm256_hadd_epi32(dot.sum[2], dot.sum[3]);
    return {_mm256_permute4x64_epi64(a, 0xd8), _mm256_permute4x64_epi64(b, 0xd8)};
}
INLINE I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE I swap_lanes_by_two(I x) { return {_mm256_shuffle_epi32(x.a, 0x4e), _mm256_shuffle_epi32(x.b, 0x4e)}; }
INLINE I swap_lanes_by_one(I x) { return {_mm256_shuffle_epi32(x.a, 0xb1), _mm256_shuffle_epi32(x.b, 0xb1)}; }
// Quarter t of a, b, c, d becomes quarters 0 to 3 of the t-th.
INLINE void transpose_quarters(I& a, I& b, I& c, I& d) {
    const auto low = [](__m256i x, __m256i y) { return _mm256_permute2x128_si256(x, y, 0x20); };
    const auto high = [](__m256i x, __m256i y) { return _mm256_permute2x128_si256(x, y, 0x31); };
    const I was[4] = {a, b, c, d};
    a = {low(was[0].a, was[1].a), low(was[2].a, was[3].a)}, b = {high(was[0].a, was[1].a), high(was[2].a, was[3].a)};
    c = {low(was[0].b, was[1].b), low(was[2].b, was[3].b)}, d = {high(was[0].b, was[1].b), high(was[2].b, was[3].b)};
}
INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

INLINE void prefetch(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T1); }

}  // namespace ranktower::RANKTOWER_LEVEL
