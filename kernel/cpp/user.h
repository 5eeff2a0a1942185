// A user made ready once a request: every vector spread over the lanes that will meet it, weights, masks, int16 quads.

#pragma once

#include "record.h"

namespace ranktower::RANKTOWER_LEVEL {

constexpr int most_blocks = max_user_heads / 4;

INLINE int blocks_of(const Shape& s) { return (s.user_heads + 3) / 4; }  // of four user heads

// How far the loops run. With D > 0 the compiler knows, unrolls and keeps in registers: 4x4x32 MaxSim takes 0.7 of the
// time.
struct Size {
    int heads, dims, plain;

    // Registers of 16 lanes that one user vector takes when spread: a register of an item holds 4 quads.
    constexpr int steps() const { return dims / (heads >= 4 ? 4 : 16 / heads); }
    constexpr int quarters() const { return heads * dims / 16; }  // 16-octet quarters of an int8 matrix
    constexpr int octet_steps() const { return (quarters() + 3) / 4; }
    // A user vector for int8 items: 16 numbers to start from, then its quads.
    constexpr size_t int16_bytes() const { return 64 + octet_steps() * user_quads_bytes; }
    constexpr size_t spread_bytes() const { return 64 * size_t(steps()); }
};

template <int H, int D>
INLINE Size size_of(const Shape& s) {
    return D > 0 ? Size{H, D, D} : Size{H, s.dims, s.plain};
}

constexpr size_t line = 64;

// Every cache line that holds octets [from, to) of a record.
INLINE void prefetch_octets(const uint8_t* record, size_t from, size_t to) {
    for (size_t at = from; at < to; at += line) prefetch(record + at);
    prefetch(record + to - 1);
}

INLINE Size size_of(const Shape& s) { return {s.heads, s.dims, s.plain}; }

// to (steps, 16): lane 4 t + j of step i is dimension 4 (i * groups + group of quarter t) + j.
inline void spread(const Shape& s, const float* vector, float* to) {
    const int groups = s.heads >= 4 ? 1 : 4 / s.heads, steps = size_of(s).steps();
    for (int i = 0; i < steps; ++i)
        for (int t = 0; t < 4; ++t)
            for (int j = 0; j < 4; ++j) {
                const int k = 4 * (i * groups + t / (4 / groups)) + j;
                to[16 * i + 4 * t + j] = k < s.dim ? vector[k] : 0.0f;
            }
}

constexpr float int16_most = 127 * 256;  // splits into two signed octets, and 256 products of it with 127 fit 32 bits

// One user vector as int16: returns its scale, NaN where a number is not finite. start (16,) int32: -128 times the sum
// of each lane's quads.
inline float spread_int16(const Shape& s, const float* vector, uint8_t* to, int32_t* start) {
    float most = 0;
    for (int k = 0; k < s.dim; ++k) {
        const float size = vector[k] < 0 ? -vector[k] : vector[k];
        most = size > most ? size : most;
    }
    bool finite = true;
    for (int k = 0; k < s.dim; ++k) finite &= vector[k] - vector[k] == 0;
    const float scale = finite ? most / int16_most : 0.0f;  // 0 also of vectors below 1e-40
    for (int lane = 0; lane < 16; ++lane) start[lane] = 0;
    for (int i = 0; i < size_of(s).octet_steps(); ++i) {
        int16_t quads[64];
        for (int lane = 0; lane < 16; ++lane)
            for (int j = 0; j < 4; ++j) {
                const int k = (16 * i + lane) / s.heads * 4 + j;
                const float x = k < s.dim && scale > 0 ? vector[k] / scale : 0.0f;
                const int rounded = int(x < 0 ? x - 0.5f : x + 0.5f);
                quads[4 * lane + j] = int16_t(rounded);
                start[lane] -= 128 * rounded;
            }
        store_user_quads(to + i * user_quads_bytes, quads);
    }
    return finite ? scale : __builtin_nanf("");
}

// --- what both kernels do with registers of scores

// Adds up quarters that hold different dimensions of one head; after it quarter t holds item head t modulo H.
template <int H>
INLINE F fold(F x) {
    if constexpr (H == 1) return add_quarters(x);
    if constexpr (H == 2) return add_halves(x);
    return x;
}

template <int H>
INLINE F most_of_quarters(F x) {
    if constexpr (H == 1) return x;
    return max_quarters(x);
}

constexpr int tiles_of(int heads) { return heads > 4 ? heads / 4 : 1; }  // registers of 4 user heads x 4 item heads

// Four user heads' sums over int8 quads -> tiles: quarter p, lane q of tile t is user head p with item head 4 t + q
// (lane q modulo H where H < 4).
template <int H>
INLINE void int8_tiles(const Size& z, const int8_t* item, const uint8_t* users, F* tiles) {
    I sums[4];
    const int whole = z.quarters() / 4, rest = z.quarters() % 4;
    for (int p = 0; p < 4; ++p) {
        const uint8_t* user = users + p * z.int16_bytes();
        Dot dot;
        dot_start(dot, (const int32_t*)user);
        user += 64;
        for (int i = 0; i < whole; ++i) dot_step(dot, item + 64 * i, user + i * user_quads_bytes, 4);
        if (rest) dot_step(dot, item + 64 * whole, user + whole * user_quads_bytes, rest);
        sums[p] = dot_finish(dot);
    }
    transpose_quarters(sums[0], sums[1], sums[2], sums[3]);
    if constexpr (H <= 4) {
        I sum = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
        if constexpr (H <= 2) sum = add(sum, swap_lanes_by_two(sum));
        if constexpr (H == 1) sum = add(sum, swap_lanes_by_one(sum));
        tiles[0] = to_float(sum);
    } else if constexpr (H == 8) {
        tiles[0] = to_float(add(sums[0], sums[2])), tiles[1] = to_float(add(sums[1], sums[3]));
    } else {
        for (int t = 0; t < 4; ++t) tiles[t] = to_float(sums[t]);
    }
}

// Four of an item's f16 scales, from `scales` on, in the lanes of every quarter (lane q modulo H where H < 4).
template <int H>
INLINE F scales_in_lanes(const uint8_t* scales) {
    uint64_t four = 0;
    __builtin_memcpy(&four, scales, H >= 4 ? 8 : 2 * H);
    if constexpr (H == 2) four |= four << 32;
    if constexpr (H == 1) four *= 0x0001000100010001;
    return load_scales(four);
}

}  // namespace ranktower::RANKTOWER_LEVEL
