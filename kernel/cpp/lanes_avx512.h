// Sixteen floats as one 512-bit register. With __AVX512VNNI__ int8 quads are summed by VPDPBUSD, else as int16 by
// VPMADDWD.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define INLINE inline __attribute__((always_inline))

namespace ranktower::RANKTOWER_LEVEL {

using F = __m512;
using I = __m512i;

INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F broadcast(float x) { return _mm512_set1_ps(x); }
INLINE F load(const float* from) { return _mm512_loadu_ps(from); }
INLINE F load(const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
INLINE F load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
INLINE F load_scales(uint64_t four) {  // four halves in every quarter
    return _mm512_broadcast_f32x4(_mm_cvtph_ps(_mm_cvtsi64_si128((long long)four)));
}
INLINE F load_quad(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
INLINE F load_pair(const float* from) {
    const F both = _mm512_castps256_ps512(_mm256_loadu_ps(from));
    return _mm512_shuffle_f32x4(both, both, 0x50);
}
INLINE void store(float* to, F x) { _mm512_storeu_ps(to, x); }

INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F where_equal(F a, F b, F x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), x); }  // else 0

INLINE F reciprocal(F x) {  // 14 bits, and one step of Newton for all of them
    const F r = _mm512_rcp14_ps(x);
    return mul(r, _mm512_fnmadd_ps(x, r, broadcast(2.0f)));
}
INLINE F inverse_root(F x) {
    const F r = _mm512_rsqrt14_ps(x);
    return mul(r, _mm512_fnmadd_ps(mul(x, r), mul(r, broadcast(0.5f)), broadcast(1.5f)));
}
INLINE F power_of_two(F x) {  // 2^x for x <= 0
    const F whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = sub(x, whole);
    F y = fma(broadcast(exp2_5), f, broadcast(exp2_4));
    y = fma(y, f, broadcast(exp2_3));
    y = fma(y, f, broadcast(exp2_2));
    y = fma(y, f, broadcast(exp2_1));
    return _mm512_scalef_ps(fma(y, f, broadcast(exp2_0)), whole);
}

// --- within quarters

template <int lane>
INLINE F lane_of_quarter(F x) {
    return _mm512_permute_ps(x, lane * 0x55);
}
INLINE F sum_lanes(F x) {
    x = add(x, _mm512_permute_ps(x, 0x4e));
    return add(x, _mm512_permute_ps(x, 0xb1));
}
INLINE F max_lanes(F x) {
    x = max(x, _mm512_permute_ps(x, 0x4e));
    return max(x, _mm512_permute_ps(x, 0xb1));
}
INLINE F sum_transposed(F a, F b, F c, F d) {  // lane p of quarter t: the sum of quarter t of the p-th
    const F ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const F cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

// --- across quarters

INLINE F add_quarters(F x) {
    x = add(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    return add(x, _mm512_shuffle_f32x4(x, x, 0xb1));
}
INLINE F add_halves(F x) { return add(x, _mm512_shuffle_f32x4(x, x, 0x4e)); }  // quarters 0+2, 1+3, 0+2, 1+3
INLINE F max_quarters(F x) {
    x = max(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    return max(x, _mm512_shuffle_f32x4(x, x, 0xb1));
}
INLINE F transpose(F x) {  // lane p of quarter t <-> lane t of quarter p
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}
INLINE float first(F x) { return _mm512_cvtss_f32(x); }
INLINE F zip_low(F a, F b) {  // a0 b0 a1 b1 ... a7 b7
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}
INLINE F zip_high(F a, F b) {  // a8 b8 ... a15 b15
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31),
                                  b);
}

// --- int8 dot products: 16 quads of an item with the int16 quads of a user

INLINE __m512i load_quarters(const int8_t* from, int quarters) {  // reads no octet beyond them
    return quarters == 4 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi32((1u << (4 * quarters)) - 1, from);
}

constexpr size_t user_quads_bytes = 128;  // of 16 quads

#ifdef __AVX512VNNI__

// VPDPBUSD multiplies unsigned by signed: items get 128 added, users are split as 256 high + low, and what the 128 adds
// is taken off by starting from -128 times the sum of the user's octets.
struct Dot {
    __m512i high, low;
};

INLINE void store_user_quads(uint8_t* to, const int16_t* quads) {
    for (int i = 0; i < 64; ++i) {
        const int high = (quads[i] + 128) >> 8;
        to[i] = uint8_t(int8_t(high)), to[64 + i] = uint8_t(int8_t(quads[i] - 256 * high));
    }
}
INLINE void dot_start(Dot& dot, const int32_t* start) {
    dot.high = _mm512_setzero_si512(), dot.low = _mm512_loadu_si512(start);
}
INLINE void dot_step(Dot& dot, const int8_t* item, const uint8_t* user, int quarters) {
    const __m512i octets = _mm512_xor_si512(load_quarters(item, quarters), _mm512_set1_epi8(int8_t(-128)));
    dot.high = _mm512_dpbusd_epi32(dot.high, octets, _mm512_loadu_si512(user));
    dot.low = _mm512_dpbusd_epi32(dot.low, octets, _mm512_loadu_si512(user + 64));
}
INLINE I dot_finish(const Dot& dot) { return _mm512_add_epi32(_mm512_slli_epi32(dot.high, 8), dot.low); }

#else

struct Dot {
    __m512i lower, upper;  // two sums for each of 8 quads
};

INLINE void store_user_quads(uint8_t* to, const int16_t* quads) { __builtin_memcpy(to, quads, 128); }
INLINE void dot_start(Dot& dot, const int32_t*) { dot.lower = dot.upper = _mm512_setzero_si512(); }
INLINE void dot_step(Dot& dot, const int8_t* item, const uint8_t* user, int quarters) {
    const __m512i octets = load_quarters(item, quarters);
    const __m512i lower = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(octets));
    const __m512i upper = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(octets, 1));
    dot.lower = _mm512_add_epi32(dot.lower, _mm512_madd_epi16(lower, _mm512_loadu_si512(user)));
    dot.upper = _mm512_add_epi32(dot.upper, _mm512_madd_epi16(upper, _mm512_loadu_si512(user + 64)));
}
INLINE I dot_finish(const Dot& dot) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_permutex2var_epi32(dot.lower, even, dot.upper),
                            _mm512_permutex2var_epi32(dot.lower, odd, dot.upper));
}

#endif

INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE I swap_lanes_by_two(I x) { return _mm512_shuffle_epi32(x, _MM_PERM_BADC); }
INLINE I swap_lanes_by_one(I x) { return _mm512_shuffle_epi32(x, _MM_PERM_CDAB); }
// Quarter t of a, b, c, d becomes quarters 0 to 3 of the t-th.
INLINE void transpose_quarters(I& a, I& b, I& c, I& d) {
    const I ab01 = _mm512_shuffle_i32x4(a, b, 0x44), ab23 = _mm512_shuffle_i32x4(a, b, 0xee);
    const I cd01 = _mm512_shuffle_i32x4(c, d, 0x44), cd23 = _mm512_shuffle_i32x4(c, d, 0xee);
    a = _mm512_shuffle_i32x4(ab01, cd01, 0x88), b = _mm512_shuffle_i32x4(ab01, cd01, 0xdd);
    c = _mm512_shuffle_i32x4(ab23, cd23, 0x88), d = _mm512_shuffle_i32x4(ab23, cd23, 0xdd);
}
INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }

INLINE void prefetch(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T1); }

}  // namespace ranktower::RANKTOWER_LEVEL
