// Sixteen floats as four 128-bit vectors of the compiler: SSE2 on x86-64, NEON on ARM, plain loops elsewhere.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

#define INLINE inline __attribute__((always_inline))

namespace ranktower::RANKTOWER_LEVEL {

using Quad = float __attribute__((vector_size(16)));
using QuadInt = int32_t __attribute__((vector_size(16)));

struct F {
    Quad q[4];
};
struct I {
    QuadInt q[4];
};

#define EACH_QUARTER for (int t = 0; t < 4; ++t)

INLINE F zero() { return F{}; }
INLINE F broadcast(float x) {
    F r;
    EACH_QUARTER r.q[t] = Quad{x, x, x, x};
    return r;
}
INLINE F load(const float* from) {
    F r;
    std::memcpy(&r, from, 64);
    return r;
}
INLINE F load(const uint16_t* from) {
    F r;
    EACH_QUARTER r.q[t] = Quad{from_half(from[4 * t]), from_half(from[4 * t + 1]), from_half(from[4 * t + 2]),
                               from_half(from[4 * t + 3])};
    return r;
}
INLINE F load(const int8_t* from) {
    F r;
    EACH_QUARTER r.q[t] =
        Quad{float(from[4 * t]), float(from[4 * t + 1]), float(from[4 * t + 2]), float(from[4 * t + 3])};
    return r;
}
INLINE F load_scales(uint64_t four) {  // four halves in every quarter
    F r;
    EACH_QUARTER for (int i = 0; i < 4; ++i) r.q[t][i] = from_half(uint16_t(four >> 16 * i));
    return r;
}
INLINE F load_quad(const float* from) {  // four floats in every quarter
    F r;
    EACH_QUARTER std::memcpy(&r.q[t], from, 16);
    return r;
}
INLINE F load_pair(const float* from) {  // quarters 0 0 1 1 of eight floats
    F r;
    EACH_QUARTER std::memcpy(&r.q[t], from + 4 * (t / 2), 16);
    return r;
}
INLINE void store(float* to, F x) { std::memcpy(to, &x, 64); }

INLINE F add(F a, F b) {
    EACH_QUARTER a.q[t] += b.q[t];
    return a;
}
INLINE F sub(F a, F b) {
    EACH_QUARTER a.q[t] -= b.q[t];
    return a;
}
INLINE F mul(F a, F b) {
    EACH_QUARTER a.q[t] *= b.q[t];
    return a;
}
INLINE F fma(F a, F b, F c) {
    EACH_QUARTER c.q[t] += a.q[t] * b.q[t];
    return c;
}
INLINE F max(F a, F b) {
    EACH_QUARTER a.q[t] = a.q[t] > b.q[t] ? a.q[t] : b.q[t];
    return a;
}
INLINE F where_equal(F a, F b, F x) {  // else 0
    EACH_QUARTER x.q[t] = a.q[t] == b.q[t] ? x.q[t] : Quad{};
    return x;
}
INLINE F reciprocal(F x) {
    EACH_QUARTER x.q[t] = 1.0f / x.q[t];
    return x;
}
INLINE F inverse_root(F x) {
    EACH_QUARTER for (int i = 0; i < 4; ++i) x.q[t][i] = 1.0f / std::sqrt(x.q[t][i]);
    return x;
}
INLINE F power_of_two(F x) {  // 2^x for x <= 0
    EACH_QUARTER for (int i = 0; i < 4; ++i) {
        const float least = x.q[t][i] > -1000.0f ? x.q[t][i] : -1000.0f, whole = std::floor(least + 0.5f),
                    f = least - whole;
        const float y = exp2_0 + f * (exp2_1 + f * (exp2_2 + f * (exp2_3 + f * (exp2_4 + f * exp2_5))));
        const int32_t bits = whole < -126 ? 0 : (int32_t(whole) + 127) << 23;
        float power;
        std::memcpy(&power, &bits, 4);
        x.q[t][i] = y * power;
    }
    return x;
}

// --- within quarters

template <int lane>
INLINE F lane_of_quarter(F x) {
    EACH_QUARTER x.q[t] = Quad{x.q[t][lane], x.q[t][lane], x.q[t][lane], x.q[t][lane]};
    return x;
}
INLINE F sum_lanes(F x) {
    EACH_QUARTER {
        const float sum = (x.q[t][0] + x.q[t][2]) + (x.q[t][1] + x.q[t][3]);
        x.q[t] = Quad{sum, sum, sum, sum};
    }
    return x;
}
INLINE F max_lanes(F x) {
    EACH_QUARTER {
        const float a = x.q[t][0] > x.q[t][2] ? x.q[t][0] : x.q[t][2],
                    b = x.q[t][1] > x.q[t][3] ? x.q[t][1] : x.q[t][3];
        const float most = a > b ? a : b;
        x.q[t] = Quad{most, most, most, most};
    }
    return x;
}
INLINE F sum_transposed(F a, F b, F c, F d) {  // lane p of quarter t: the sum of quarter t of the p-th
    F r;
    EACH_QUARTER r.q[t] =
        Quad{(a.q[t][0] + a.q[t][2]) + (a.q[t][1] + a.q[t][3]), (b.q[t][0] + b.q[t][2]) + (b.q[t][1] + b.q[t][3]),
             (c.q[t][0] + c.q[t][2]) + (c.q[t][1] + c.q[t][3]), (d.q[t][0] + d.q[t][2]) + (d.q[t][1] + d.q[t][3])};
    return r;
}

// --- across quarters

INLINE F add_quarters(F x) {
    const Quad sum = (x.q[0] + x.q[2]) + (x.q[1] + x.q[3]);
    return F{{sum, sum, sum, sum}};
}
INLINE F add_halves(F x) {  // quarters 0+2, 1+3, 0+2, 1+3
    const Quad even = x.q[0] + x.q[2], odd = x.q[1] + x.q[3];
    return F{{even, odd, even, odd}};
}
INLINE F max_quarters(F x) {
    const F y = max(x, F{{x.q[2], x.q[3], x.q[0], x.q[1]}});
    return max(y, F{{y.q[1], y.q[0], y.q[3], y.q[2]}});
}
INLINE F transpose(F x) {  // lane p of quarter t <-> lane t of quarter p
    F r;
    EACH_QUARTER r.q[t] = Quad{x.q[0][t], x.q[1][t], x.q[2][t], x.q[3][t]};
    return r;
}
INLINE float first(F x) { return x.q[0][0]; }
INLINE F zip(const Quad* x, const Quad* y) {
    F r;
    EACH_QUARTER {
        const Quad a = x[t / 2], b = y[t / 2];
        r.q[t] = t % 2 ? Quad{a[2], b[2], a[3], b[3]} : Quad{a[0], b[0], a[1], b[1]};
    }
    return r;
}
INLINE F zip_low(F x, F y) { return zip(x.q, y.q); }           // x0 y0 x1 y1 ... x7 y7
INLINE F zip_high(F x, F y) { return zip(x.q + 2, y.q + 2); }  // x8 y8 ... x15 y15

// --- int8 dot products: 16 quads of an item with the int16 quads of a user

struct Dot {
    int32_t sum[16];
};
constexpr size_t user_quads_bytes = 128;  // of 16 quads

INLINE void store_user_quads(uint8_t* to, const int16_t* quads) { std::memcpy(to, quads, 128); }
INLINE void dot_start(Dot& dot, const int32_t*) { std::memset(&dot, 0, sizeof dot); }
INLINE void dot_step(Dot& dot, const int8_t* item, const uint8_t* user, int quarters) {
    int16_t quads[64];
    std::memcpy(quads, user, 128);
    for (int lane = 0; lane < 4 * quarters; ++lane)
        for (int j = 0; j < 4; ++j) dot.sum[lane] += int32_t(item[4 * lane + j]) * quads[4 * lane + j];
}
INLINE I dot_finish(const Dot& dot) {
    I r;
    std::memcpy(&r, dot.sum, 64);
    return r;
}
INLINE I add(I a, I b) {
    EACH_QUARTER a.q[t] += b.q[t];
    return a;
}
INLINE I swap_lanes_by_two(I x) {
    EACH_QUARTER x.q[t] = QuadInt{x.q[t][2], x.q[t][3], x.q[t][0], x.q[t][1]};
    return x;
}
INLINE I swap_lanes_by_one(I x) {
    EACH_QUARTER x.q[t] = QuadInt{x.q[t][1], x.q[t][0], x.q[t][3], x.q[t][2]};
    return x;
}
// Quarter t of a, b, c, d becomes quarters 0 to 3 of the t-th.
INLINE void transpose_quarters(I& a, I& b, I& c, I& d) {
    const I was[4] = {a, b, c, d};
    EACH_QUARTER a.q[t] = was[t].q[0], b.q[t] = was[t].q[1], c.q[t] = was[t].q[2], d.q[t] = was[t].q[3];
}
INLINE F to_float(I x) {
    F r;
    EACH_QUARTER for (int i = 0; i < 4; ++i) r.q[t][i] = float(x.q[t][i]);
    return r;
}

#undef EACH_QUARTER

INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

}  // namespace ranktower::RANKTOWER_LEVEL
