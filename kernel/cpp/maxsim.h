// MaxSim: s = scale * sum_p max_q <u_p, v_q> + b, for vectors that the towers have normalised, or raw ones.
// The dot product is its case of one head each.
//
// Layout      record.h; a register of 16 lanes holds 4 quads of an item: with 4 heads one quad of each, so that the
//             sums of a user head with four item heads lie in the four quarters of one register
// Precision   f32, f16: products and sums in f32.  int8: items as stored, users as int16 with a scale for each head,
//             sums exact in int32, so equal on every level; the rest in f32
// avx512-vnni 4x4x32 int8: 16 VPDPBUSD, 14 shuffles, 8 adds an item; two cache lines and the scales' one
// avx512      the same with VPMADDWD on int16
// avx2        VPMADDWD on 256 bits; f16 by VCVTPH2PS
// portable    128-bit vectors of the compiler; f16 in software

#pragma once

#include "user.h"

namespace ranktower::RANKTOWER_LEVEL {

// Prepared: for each block of 4 user heads a register of weights (scale, 0 where no head is), then the 4 vectors.
constexpr size_t maxsim_block_bytes(const Size& z, bool int8) {
    return 64 + 4 * (int8 ? z.int16_bytes() : z.spread_bytes());
}

inline void maxsim_prepare(const Shape& s, const float* user, uint8_t* to) {
    float none[max_dim] = {};
    const Size z = size_of(s);
    const bool int8 = s.dtype == Dtype::int8;
    for (int p = 0; p < 4 * blocks_of(s); ++p) {
        const bool real = p < s.user_heads;
        const float* vector = real ? user + size_t(p) * s.dim : none;
        uint8_t* block = to + p / 4 * maxsim_block_bytes(z, int8);
        float* weights = (float*)block;
        float weight = real ? s.scale : 0.0f;
        if (int8) {
            uint8_t* at = block + 64 + (p % 4) * z.int16_bytes();
            weight *= spread_int16(s, vector, at + 64, (int32_t*)at);
            for (int lane = 0; lane < 4; ++lane) weights[4 * (p % 4) + lane] = weight;  // quarter p
        } else {
            float* at = (float*)(block + 64) + size_t(p % 4) * 16 * z.steps();
            spread(s, vector, at);
            for (int t = 0; t < 4; ++t) weights[4 * t + p % 4] = weight;  // lane p
        }
    }
}

template <int H, int D, class Value>
INLINE float maxsim(const Shape& s, const uint8_t* prepared, const Value* item) {
    const Size z = size_of<H, D>(s);
    const int steps = z.steps(), blocks = blocks_of(s);
    constexpr int tiles = tiles_of(H);
    F total = zero();
    for (int b = 0; b < blocks; ++b, prepared += maxsim_block_bytes(z, false)) {
        const float* users = (const float*)(prepared + 64);
        F best = zero();
        for (int t = 0; t < tiles; ++t) {
            F sums[4] = {zero(), zero(), zero(), zero()};
            for (int i = 0; i < steps; ++i) {
                const F x = load(item + 16 * (i * tiles + t));
                for (int p = 0; p < 4; ++p) sums[p] = fma(x, load(users + 16 * (p * steps + i)), sums[p]);
            }
            const F found = fold<H>(sum_transposed(sums[0], sums[1], sums[2], sums[3]));
            best = t == 0 ? found : max(best, found);
        }
        total = fma(most_of_quarters<H>(best), load((const float*)prepared), total);
    }
    return first(sum_lanes(total));
}

template <int H, int D>
INLINE float maxsim(const Shape& s, const uint8_t* prepared, const int8_t* item) {
    const Size z = size_of<H, D>(s);
    const uint8_t* scales = (const uint8_t*)item + s.scales_at;
    constexpr int tiles = tiles_of(H);
    F total = zero();
    for (int b = 0; b < blocks_of(s); ++b, prepared += maxsim_block_bytes(z, true)) {
        F found[tiles];
        int8_tiles<H>(z, item, prepared + 64, found);
        F best = mul(found[0], scales_in_lanes<H>(scales));
        for (int t = 1; t < tiles; ++t) best = max(best, mul(found[t], scales_in_lanes<H>(scales + 8 * t)));
        total = fma(H == 1 ? best : max_lanes(best), load((const float*)prepared), total);
    }
    return first(add_quarters(total));
}

}  // namespace ranktower::RANKTOWER_LEVEL
