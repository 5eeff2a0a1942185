// Gated cross-attention and MaxSim: the full RankTower score of a user and an item.
//
//   P  = softmax_q(A E_i^T / sqrt(d))      R  = softmax_p(B E_i^T / sqrt(d))          (Hu, Hi)
//   U  = E_u + G_u * (P V_i)               I  = E_i + G_i * (R^T V_u)                 (Hu, d), (Hi, d)
//   s  = scale * sum_p max_q <U_p, I_q> / (max(|U_p|, 1e-6) max(|I_q|, 1e-6)) + b
//
// Layout      record.h. E and G in quads: their sums over d end in quarters (see maxsim.h), and R^T V_u is made in the
//             same lanes from a V_u that was spread once a request. V head after head: P V_i is a sum of whole
//             registers, each times one number read back from memory, which costs no shuffle
// Precision   all in f32 but the products with A and B of int8 items: items int8, users int16, sums exact. 1/sqrt(d)
//             and log2(e) are folded into A and B; 2^x by a polynomial of degree 5 (8e-8); 1/x and 1/sqrt(x) by an
//             estimate and one step of Newton (below 4e-7)
// avx512-vnni 4x4x32 f16: 192 multiply-adds, about 90 shuffles, 24 conversions an item; int8 replaces 64 of the
//             multiply-adds by 32 VPDPBUSD and reads half of the cache lines
// avx512      int8 by VPMADDWD                avx2   256 bits                portable   128-bit vectors of the compiler

#pragma once

#include "user.h"

namespace ranktower::RANKTOWER_LEVEL {

constexpr float norm_floor = 1e-6f;
constexpr float least_scale = 0x1p-24f;  // the smallest half above 0: of a head of zeros
constexpr float log2_e = 1.44269504f;
constexpr float never = -1e30f;  // added to the affinity of a head that only fills a register

struct CrossLayout {  // of a prepared user, in octets
    size_t block_bytes, head_bytes, affinity_bytes;
    size_t blocks_at, heads_at, bytes;
    // a block: weights, mask, scale of A, scale of B, 16 floats each, then four A and four B; a head: V spread, then
    size_t e_at, g_at;
};

constexpr CrossLayout cross_layout(const Size& z, int blocks, bool int8) {
    CrossLayout l{};
    l.affinity_bytes = int8 ? z.int16_bytes() : z.spread_bytes();
    l.e_at = z.spread_bytes(), l.g_at = l.e_at + 4 * size_t(z.plain);
    l.head_bytes = l.g_at + 4 * size_t(z.plain);
    l.block_bytes = 4 * 64 + 8 * l.affinity_bytes;
    l.blocks_at = 64 * size_t(tiles_of(z.heads));  // first the masks of item heads
    l.heads_at = l.blocks_at + blocks * l.block_bytes;
    l.bytes = l.heads_at + 4 * blocks * l.head_bytes;
    return l;
}

inline void cross_prepare(const Shape& s, const float* user, uint8_t* to) {
    const Size z = size_of(s);
    const bool int8 = s.dtype == Dtype::int8;
    const CrossLayout l = cross_layout(z, blocks_of(s), int8);
    const size_t matrix = size_t(s.user_heads) * s.dim;
    const float fold_in = log2_e / __builtin_sqrtf(float(s.dim));
    float* masks = (float*)to;
    for (int t = 0; t < tiles_of(s.heads); ++t)
        for (int lane = 0; lane < 16; ++lane)
            masks[16 * t + lane] = (4 * t + lane / 4) % s.heads < s.item_heads ? 0.0f : never;
    for (int p = 0; p < 4 * blocks_of(s); ++p) {
        const bool real = p < s.user_heads;
        float vectors[5][max_dim] = {};  // E V G A B
        for (int part = 0; part < 5; ++part)
            for (int k = 0; real && k < s.dim; ++k)
                vectors[part][k] = user[part * matrix + size_t(p) * s.dim + k] * (part >= 3 ? fold_in : 1.0f);
        uint8_t* block = to + l.blocks_at + p / 4 * l.block_bytes;
        float scales[2] = {1.0f, 1.0f};
        for (int side = 0; side < 2; ++side) {
            uint8_t* at = block + 256 + (4 * side + p % 4) * l.affinity_bytes;
            if (int8) scales[side] = spread_int16(s, vectors[3 + side], at + 64, (int32_t*)at);
            else spread(s, vectors[3 + side], (float*)at);
        }
        float* constants = (float*)block;
        for (int t = 0; t < 4; ++t) {
            const int lane = 4 * t + p % 4;
            constants[lane] = real ? s.scale : 0.0f, constants[16 + lane] = real ? 0.0f : never;
            constants[32 + lane] = scales[0], constants[48 + lane] = scales[1];
        }
        uint8_t* head = to + l.heads_at + p * l.head_bytes;
        spread(s, vectors[1], (float*)head);
        for (int k = 0; k < z.plain; ++k) {
            ((float*)(head + l.e_at))[k] = k < s.dim ? vectors[0][k] : 0.0f;
            ((float*)(head + l.g_at))[k] = k < s.dim ? vectors[2][k] : 0.0f;
        }
    }
}

// The same four dimensions in the quarters of every item head that a register holds.
template <int H>
INLINE F spread_again(const float* plain, int step) {
    if constexpr (H == 1) return load(plain + 16 * step);
    if constexpr (H == 2) return load_pair(plain + 8 * step);
    return load_quad(plain + 4 * step);
}

// One item's chain of dependent steps takes about 300 cycles and 400 instructions, more than a processor looks ahead.
// So items go in batches through one stage after the other, where the next item's work fills the gaps: 4x4x32 takes 0.6
// of the time that it takes item by item.
template <int blocks>
constexpr int batch_of = blocks <= 2 ? 8 : 1;

template <int H, int D, class Value, int blocks>  // blocks of four user heads: exactly so many, or at most most_blocks
struct Cross {
    static constexpr int tiles = tiles_of(H), batch = batch_of<blocks>;
    static constexpr bool int8 = sizeof(Value) == 1;
    // Softmax over quarters counts every item head 4/H times where H < 4.
    static constexpr float copies = H < 4 ? 4 / H : 1;

    struct Item {
        F seen[blocks][tiles];                                           // R: quarter q, lane p
        F lengths[blocks];                                               // 1/|U_p| in lane p
        alignas(64) float looks[blocks][16 * tiles];                     // P: at 4 q + p
        alignas(64) float attended[4 * blocks * (D > 0 ? D : max_dim)];  // U: (4 blocks, plain)
    };

    const Shape& s;
    const uint8_t* user;
    const CrossLayout layout;

    // Made anew wherever they are used: constants, where D and blocks are known. A stored copy is no constant to GCC.
    INLINE int count() const { return blocks < most_blocks ? blocks : blocks_of(s); }
    INLINE Size size() const { return size_of<H, D>(s); }
    INLINE CrossLayout at() const {
        return D > 0 && blocks < most_blocks ? cross_layout(Size{H, D, D}, blocks, int8) : layout;
    }

    INLINE const float* constants(int b) const { return (const float*)(user + at().blocks_at + b * at().block_bytes); }
    INLINE const uint8_t* head(int p) const { return user + at().heads_at + p * at().head_bytes; }
    INLINE F scales_in_quarters(const uint8_t* record, int part, int t) const {
        return transpose(scales_in_lanes<H>(record + s.scales_at + 2 * part * H + 8 * t));
    }

    // Affinities of user block b with the item, both sides (A, B) at once: quarter q, lane p of tile t.
    INLINE void affinities(const uint8_t* record, int b, F (*found)[tiles]) const {
        const uint8_t* users = user + at().blocks_at + b * at().block_bytes + 256;
        if constexpr (int8) {
            for (int side = 0; side < 2; ++side) {
                int8_tiles<H>(size(), (const int8_t*)record, users + 4 * side * at().affinity_bytes, found[side]);
                const F scale = load(constants(b) + 32 + 16 * side);
                for (int t = 0; t < tiles; ++t) {
                    const F scales = scales_in_lanes<H>(record + s.scales_at + 8 * t);
                    found[side][t] = mul(transpose(mul(found[side][t], scales)), scale);
                }
            }
        } else {
            const Value* item = (const Value*)record;
            for (int t = 0; t < tiles; ++t) {
                F sums[8];
                for (int p = 0; p < 8; ++p) sums[p] = zero();
                for (int i = 0; i < size().steps(); ++i) {
                    const F x = load(item + 16 * (i * tiles + t));
                    for (int p = 0; p < 8; ++p)
                        sums[p] = fma(x, load((const float*)(users + p * at().affinity_bytes) + 16 * i), sums[p]);
                }
                found[0][t] = fold<H>(sum_transposed(sums[0], sums[1], sums[2], sums[3]));
                found[1][t] = fold<H>(sum_transposed(sums[4], sums[5], sums[6], sums[7]));
            }
        }
    }

    // P of a block, from its affinities x: softmax over item heads. int8 folds the scales of V in.
    INLINE void look(const uint8_t* record, F* x, float* to) const {
        F most = zero(), sum = zero();
        for (int t = 0; t < tiles; ++t) {
            x[t] = add(x[t], load((const float*)user + 16 * t));
            most = t == 0 ? x[t] : max(most, x[t]);
        }
        most = max_quarters(most);
        for (int t = 0; t < tiles; ++t) x[t] = power_of_two(sub(x[t], most)), sum = t == 0 ? x[t] : add(sum, x[t]);
        const F factor = mul(reciprocal(add_quarters(sum)), broadcast(copies));
        for (int t = 0; t < tiles; ++t) {
            F weight = mul(x[t], factor);
            if constexpr (int8) weight = mul(weight, scales_in_quarters(record, 1, t));
            store(to + 16 * t, weight);
        }
    }

    // P of every block, and R: softmax over the user heads of all blocks.
    INLINE void see(const uint8_t* record, Item& item) const {
        for (int b = 0; b < count(); ++b) {
            F found[2][tiles];
            affinities(record, b, found);
            look(record, found[0], item.looks[b]);
            for (int t = 0; t < tiles; ++t) item.seen[b][t] = add(found[1][t], load(constants(b) + 16));
        }
        for (int t = 0; t < tiles; ++t) {
            F most = item.seen[0][t], sum = zero();
            for (int b = 1; b < count(); ++b) most = max(most, item.seen[b][t]);
            most = max_lanes(most);
            for (int b = 0; b < count(); ++b) {
                const F weight = power_of_two(sub(item.seen[b][t], most));
                item.seen[b][t] = weight, sum = b == 0 ? weight : add(sum, weight);
            }
            const F factor = reciprocal(sum_lanes(sum));
            for (int b = 0; b < count(); ++b) item.seen[b][t] = mul(item.seen[b][t], factor);
        }
    }

    // U of block b and 1/|U_p|.
    INLINE F attend(const uint8_t* record, int b, const float* weights, float* to) const {
        const Value* v = (const Value*)(record + s.v_at);
        F norms[4] = {zero(), zero(), zero(), zero()};
        for (int c = 0; c < size().plain / 16; ++c) {
            F values[H];
            for (int q = 0; q < H; ++q) values[q] = load(v + q * size().plain + 16 * c);
            for (int p = 0; p < 4; ++p) {
                F sum = mul(broadcast(weights[p]), values[0]);
                for (int q = 1; q < H; ++q) sum = fma(broadcast(weights[4 * q + p]), values[q], sum);
                const uint8_t* from = head(4 * b + p);
                const F e = load((const float*)(from + at().e_at) + 16 * c),
                        g = load((const float*)(from + at().g_at) + 16 * c);
                const F x = fma(g, sum, e);
                store(to + p * size().plain + 16 * c, x);
                norms[p] = fma(x, x, norms[p]);
            }
        }
        const F norm = add_quarters(sum_transposed(norms[0], norms[1], norms[2], norms[3]));
        return inverse_root(max(norm, broadcast(norm_floor * norm_floor)));
    }

    // best[w][b] = the most of itself and <U_p, I_q> / |I_q|, over the item heads of tile t, for `width` items at once:
    // they share what is read of the user.
    template <int width>
    INLINE void compare(const uint8_t* const* records, int t, const Item* items, F (*best)[blocks]) const {
        F weights[width][4 * blocks], sums[width][4 * blocks], norm[width], shortest[width];
        for (int w = 0; w < width; ++w) {
            // A cosine does not change with the length of I: int8 leaves E unscaled and puts both scales on what G lets
            // in.
            F ratio = zero();
            norm[w] = zero(), shortest[w] = broadcast(norm_floor);
            if constexpr (int8) {
                const F unit = reciprocal(max(scales_in_quarters(records[w], 0, t), broadcast(least_scale)));
                ratio = mul(scales_in_quarters(records[w], 2, t), unit), shortest[w] = mul(shortest[w], unit);
            }
            for (int b = 0; b < count(); ++b) {
                F seen = items[w].seen[b][t], *four = weights[w] + 4 * b;
                if constexpr (int8) seen = mul(seen, ratio);
                four[0] = lane_of_quarter<0>(seen), four[1] = lane_of_quarter<1>(seen);
                four[2] = lane_of_quarter<2>(seen), four[3] = lane_of_quarter<3>(seen);
            }
            for (int p = 0; p < 4 * count(); ++p) sums[w][p] = zero();
        }
        for (int i = 0; i < size().steps(); ++i) {
            const int place = 16 * (i * tiles + t);
            F x[width];
            for (int p = 0; p < 4 * count(); ++p) {
                const F v = load((const float*)head(p) + 16 * i);
                for (int w = 0; w < width; ++w) x[w] = p == 0 ? mul(weights[w][0], v) : fma(weights[w][p], v, x[w]);
            }
            for (int w = 0; w < width; ++w) {
                const Value *e = (const Value*)records[w], *g = (const Value*)(records[w] + s.g_at);
                x[w] = fma(load(g + place), x[w], load(e + place));
                norm[w] = fma(x[w], x[w], norm[w]);
                for (int p = 0; p < 4 * count(); ++p)
                    sums[w][p] = fma(x[w], spread_again<H>(items[w].attended + p * size().plain, i), sums[w][p]);
            }
        }
        for (int w = 0; w < width; ++w) {
            const F length = inverse_root(max(fold<H>(sum_lanes(norm[w])), mul(shortest[w], shortest[w])));
            for (int b = 0; b < count(); ++b) {
                const F* four = sums[w] + 4 * b;
                const F found = mul(fold<H>(sum_transposed(four[0], four[1], four[2], four[3])), length);
                best[w][b] = t == 0 ? found : max(best[w][b], found);
            }
        }
    }

    template <int width>
    INLINE void finish(const uint8_t* const* records, const Item* items, float* scores) const {
        F best[width][blocks];
        for (int t = 0; t < tiles; ++t) compare<width>(records, t, items, best);
        for (int w = 0; w < width; ++w) {
            F total = zero();
            for (int b = 0; b < count(); ++b)
                total = fma(mul(most_of_quarters<H>(best[w][b]), items[w].lengths[b]), load(constants(b)), total);
            scores[w] = first(sum_lanes(total));
        }
    }

    // Between the items of this batch come the next one's records, a third at each stage: all at once they would
    // fill the processor's few places for lines under way, and everything would wait.
    INLINE void score(const uint8_t* const* records, const uint8_t* const* next, int n, float* scores) const {
        Item items[batch];
        for (int i = 0; i < n; ++i) {
            prefetch_octets(next[i], 0, s.v_at);
            see(records[i], items[i]);
        }
        for (int i = 0; i < n; ++i) {
            prefetch_octets(next[i], s.v_at, s.g_at);
            for (int b = 0; b < count(); ++b)
                items[i].lengths[b] =
                    attend(records[i], b, items[i].looks[b], items[i].attended + 4 * b * size().plain);
        }
        constexpr int width = blocks == 1 ? 2 : 1;
        for (int i = 0; i < n; i += width) {
            for (int w = 0; w < width && i + w < n; ++w) prefetch_octets(next[i + w], s.g_at, s.bytes);
            if (i + width <= n) finish<width>(records + i, items + i, scores + i);
            else finish<1>(records + i, items + i, scores + i);
        }
    }
};

template <int H, int D, class Value, int blocks>
INLINE Cross<H, D, Value, blocks> make_cross(const Shape& s, const uint8_t* user) {
    return {s, user, cross_layout(size_of(s), blocks_of(s), sizeof(Value) == 1)};
}

}  // namespace ranktower::RANKTOWER_LEVEL
