// Scores of lists for training and their gradients, for both kinds of head: the formulas of cross_attention.h and
// maxsim.h on plain f32 records, without scale and with the bias apart, and what follows for a score of gradient g.
//
//   maxsim             s = sum_p max_q <E_p, E_q>
//   cross-attention    s = sum_p max_q c_pq,   c_pq = <U_p, I_q> / (|U_p| |I_q|),   |.| at least 1e-6
//       w_pq = g where q is the best of p (shared evenly by equal ones), else 0;  m_p, n_q = sums of w c over q and p
//       dU_p = sum_q w_pq I_q / (|U_p| |I_q|) - m_p U_p / |U_p|^2         the second term not where |U_p| is floored
//       dI_q = sum_p w_pq U_p / (|U_p| |I_q|) - n_q I_q / |I_q|^2
//       L = P V_i,  dE_u = dU,  dG_u = dU * L,  dL = dU * G_u,  dV_i = P^T dL,  dP = dL V_i^T
//       K = R^T V_u,  dE_i = dI,  dG_i = dI * K,  dK = dI * G_i,  dV_u = R dK,  dR = V_u dK^T
//       x = P (dP - sum_q P dP) / sqrt(d),  dA = x E_i,  dE_i += x^T A;  the same with R, over p, and B
//
// Layout      the 16 lanes are 16 pairs of one list, whose item records are transposed on the way in, and their
//             gradients on the way out. So no sum crosses lanes, any dim and any number of heads run the same loops,
//             and a user's numbers are broadcast. Gradients of the user are added up lane by lane until its list ends
// Precision   f32 throughout; 2^x, 1/x and 1/sqrt(x) as in cross_attention.h
// Cost        4x4x32: 2,560 multiply-adds a score, 6,656 with gradients; 140 KiB a thread, which the second cache holds

#pragma once

#include "training.h"

namespace ranktower::RANKTOWER_LEVEL {

constexpr size_t lanes = 16;

#if defined(__AVX512F__) && !defined(RANKTOWER_SANITIZE)
constexpr int most_tile = 4;  // 4 x 4 heads meet in registers
#else
constexpr int most_tile = 2;
#endif

template <int N>
struct Count {
    static constexpr int value = N;
};

// run(Count<N>, start) for tiles of N = most_tile, then halves of it, which cover all heads.
template <int N = most_tile, class Run>
INLINE void tile(size_t heads, Run run, size_t start = 0) {
    for (; heads - start >= N; start += N) run(Count<N>{}, start);
    if constexpr (N > 1) tile<N / 2>(heads, run, start);
}

INLINE F number(const float* x) { return broadcast(*x); }  // of the user: the same for all pairs
INLINE F number(const F* x) { return *x; }

struct Matrix {  // of a number for each pair of heads: rows p, columns q
    F* values;
    size_t rows, columns, row_step, column_step;

    INLINE F* at(size_t p, size_t q) const { return values + p * row_step + q * column_step; }
    INLINE Matrix transposed() const { return {values, columns, rows, column_step, row_step}; }
};

// to_pq = <x_p, y_q>: x (rows, d), y (columns, d).
template <class X>
INLINE void dots(const X* x, const F* y, size_t d, const Matrix& to) {
    tile(to.rows, [&](auto P, size_t p0) {
        tile(to.columns, [&](auto Q, size_t q0) {
            constexpr int rows = decltype(P)::value, columns = decltype(Q)::value;
            F sums[rows][columns];
            for (int p = 0; p < rows; ++p)
                for (int q = 0; q < columns; ++q) sums[p][q] = zero();
            for (size_t k = 0; k < d; ++k) {
                F of_y[columns];
                for (int q = 0; q < columns; ++q) of_y[q] = y[(q0 + q) * d + k];
                for (int p = 0; p < rows; ++p) {
                    const F of_x = number(x + (p0 + p) * d + k);
                    for (int q = 0; q < columns; ++q) sums[p][q] = fma(of_x, of_y[q], sums[p][q]);
                }
            }
            for (int p = 0; p < rows; ++p)
                for (int q = 0; q < columns; ++q) *to.at(p0 + p, q0 + q) = sums[p][q];
        });
    });
}

// to_p = sum_q w_pq x_q, or with `add` that much more: x (columns, d), to (rows, d).
template <bool add, class X>
INLINE void mix(const Matrix& w, const X* x, size_t d, F* to) {
    tile(w.rows, [&](auto P, size_t p0) {
        tile(w.columns, [&](auto Q, size_t q0) {
            constexpr int rows = decltype(P)::value, columns = decltype(Q)::value;
            F weights[rows][columns];
            for (int p = 0; p < rows; ++p)
                for (int q = 0; q < columns; ++q) weights[p][q] = *w.at(p0 + p, q0 + q);
            const bool more = add || q0 > 0;
            for (size_t k = 0; k < d; ++k) {
                F of_x[columns];
                for (int q = 0; q < columns; ++q) of_x[q] = number(x + (q0 + q) * d + k);
                for (int p = 0; p < rows; ++p) {
                    F* place = to + (p0 + p) * d + k;
                    F sum = more ? *place : zero();
                    for (int q = 0; q < columns; ++q) sum = fma(weights[p][q], of_x[q], sum);
                    *place = sum;
                }
            }
        });
    });
}

// Each row to its softmax; x are logarithms to base 2.
INLINE void softmax(const Matrix& x) {
    for (size_t p = 0; p < x.rows; ++p) {
        F most = *x.at(p, 0), sum = zero();
        for (size_t q = 1; q < x.columns; ++q) most = max(most, *x.at(p, q));
        for (size_t q = 0; q < x.columns; ++q) {
            *x.at(p, q) = power_of_two(sub(*x.at(p, q), most));
            sum = add(sum, *x.at(p, q));
        }
        const F factor = reciprocal(sum);
        for (size_t q = 0; q < x.columns; ++q) *x.at(p, q) = mul(*x.at(p, q), factor);
    }
}

// The gradient of each row's softmax y, in place of dy: factor y (dy - sum_q y dy).
INLINE void differentiate_softmax(const Matrix& y, const Matrix& dy, F factor) {
    for (size_t p = 0; p < y.rows; ++p) {
        F sum = zero();
        for (size_t q = 0; q < y.columns; ++q) sum = fma(*y.at(p, q), *dy.at(p, q), sum);
        for (size_t q = 0; q < y.columns; ++q) *dy.at(p, q) = mul(mul(*y.at(p, q), factor), sub(*dy.at(p, q), sum));
    }
}

INLINE void transpose_lanes(F* x) {  // lane j of the i-th <-> lane i of the j-th, of sixteen
    for (int round = 0; round < 4; ++round) {
        F was[16];
        for (int i = 0; i < 16; ++i) was[i] = x[i];
        for (int i = 0; i < 8; ++i) x[2 * i] = zip_low(was[i], was[i + 8]), x[2 * i + 1] = zip_high(was[i], was[i + 8]);
    }
}

constexpr size_t whole(size_t size) { return (size + lanes - 1) / lanes * lanes; }

struct Pairs {  // up to sixteen of one list; the last one fills the lanes
    const float* records[lanes];
    int64_t rows[lanes];
    size_t count;
};

struct Work {
    const Lists& lists;
    const size_t d, user_width, item_width;   // floats of one part: heads x d
    F *item, *item_gradient;                  // (whole(vectors_size),)
    F* user_gradient;                         // (whole(user_size),)
    F *looks, *seen, *cosines, *slopes;       // P, R, c, and a matrix more: (Hu, Hi)
    F *user_shorter, *item_shorter;           // 1/|U_p| (Hu,), 1/|I_q| (Hi,)
    F *user_free, *item_free;                 // the same squared, 0 where it is floored
    F *user_looks, *user_attended, *of_user;  // L, U, dU and then dL: (Hu, d)
    F *item_looks, *item_attended, *of_item;  // K, I, dK: (Hi, d)

    static size_t room(const Lists& l) {  // in F
        const size_t user_width = l.user_heads * l.dim, item_width = l.item_heads * l.dim;
        return 2 * whole(l.vectors_size()) + whole(l.user_size()) + 4 * l.user_heads * l.item_heads +
               2 * (l.user_heads + l.item_heads) + 3 * (user_width + item_width);
    }

    Work(const Lists& l, F* room)
        : lists(l), d(l.dim), user_width(l.user_heads * l.dim), item_width(l.item_heads * l.dim) {
        const auto take = [&](size_t size, auto&... parts) { ((parts = room, room += size), ...); };
        take(whole(l.vectors_size()), item, item_gradient);
        take(whole(l.user_size()), user_gradient);
        take(l.user_heads * l.item_heads, looks, seen, cosines, slopes);
        take(l.user_heads, user_shorter, user_free);
        take(l.item_heads, item_shorter, item_free);
        take(user_width, user_looks, user_attended, of_user);
        take(item_width, item_looks, item_attended, of_item);
    }

    INLINE Matrix matrix(F* values) const { return {values, lists.user_heads, lists.item_heads, lists.item_heads, 1}; }
    INLINE const float* user_part(const float* user, int part) const { return user + part * user_width; }
    INLINE F* item_part(F* of, int part) const { return of + part * item_width; }

    // --- in and out

    INLINE void read(const Pairs& pairs) {
        const size_t size = lists.vectors_size();
        for (size_t at = 0; at < size; at += lanes) {
            F* x = item + at;
            if (at + lanes <= size) {
                for (size_t i = 0; i < lanes; ++i) x[i] = load(pairs.records[i] + at);
            } else {
                float rest[lanes] = {};
                for (size_t i = 0; i < lanes; ++i) {
                    __builtin_memcpy(rest, pairs.records[i] + at, 4 * (size - at));
                    x[i] = load(rest);
                }
            }
            transpose_lanes(x);
        }
    }

    // Adds item_gradient to the rows of the pairs, one after the other: an item may be there twice.
    INLINE void add_items(const Pairs& pairs, float* of_items) {
        const size_t size = lists.vectors_size(), stride = lists.item_size();
        for (size_t at = 0; at < size; at += lanes) {
            F* x = item_gradient + at;
            transpose_lanes(x);
            for (size_t i = 0; i < pairs.count; ++i) {
                float* to = of_items + size_t(pairs.rows[i]) * stride + at;
                if (at + lanes <= size) {
                    store(to, add(load(to), x[i]));
                } else {
                    float rest[lanes];
                    store(rest, x[i]);
                    for (size_t k = 0; k < size - at; ++k) to[k] += rest[k];
                }
            }
        }
    }

    INLINE void write_user(float* to) {  // the sums over lanes
        const size_t size = lists.user_size();
        for (size_t at = 0; at < size; at += lanes) {
            F* x = user_gradient + at;
            transpose_lanes(x);
            for (int step = 8; step; step /= 2)
                for (int i = 0; i < step; ++i) x[i] = add(x[i], x[i + step]);
            float sums[lanes];
            store(sums, x[0]);
            __builtin_memcpy(to + at, sums, 4 * (size - at < lanes ? size - at : lanes));
        }
    }

    // --- scores

    INLINE void attend(const float* user) {
        const F *e = item, *v = item_part(item, 1), *g = item_part(item, 2);
        const F fold = broadcast(log2_e / __builtin_sqrtf(float(d)));
        for (int side = 0; side < 2; ++side) {
            const Matrix x = matrix(side ? seen : looks);
            dots(user_part(user, 3 + side), e, d, x);
            for (size_t i = 0; i < x.rows * x.columns; ++i) x.values[i] = mul(x.values[i], fold);
            softmax(side ? x.transposed() : x);
        }
        mix<false>(matrix(looks), v, d, user_looks);
        mix<false>(matrix(seen).transposed(), user_part(user, 1), d, item_looks);
        join(lists.user_heads, user, user_part(user, 2), user_looks, user_attended, user_shorter, user_free);
        join(lists.item_heads, e, g, item_looks, item_attended, item_shorter, item_free);
    }

    // to = e + g * looks, its length and what of it the gradient needs.
    template <class X>
    INLINE void join(size_t heads, const X* e, const X* g, const F* looks, F* to, F* shorter, F* free) const {
        const F least = broadcast(norm_floor * norm_floor);
        for (size_t p = 0; p < heads; ++p) {
            F norm = zero();
            for (size_t k = p * d; k < (p + 1) * d; ++k) {
                to[k] = fma(number(g + k), looks[k], number(e + k));
                norm = fma(to[k], to[k], norm);
            }
            const F most = max(least, norm);  // NaN stays
            shorter[p] = inverse_root(most);
            free[p] = where_equal(most, norm, mul(shorter[p], shorter[p]));
        }
    }

    INLINE F compare(const float* user) {
        const Matrix c = matrix(cosines);
        if (lists.kind == Kind::maxsim) {
            dots(user, item, d, c);
        } else {
            attend(user);
            dots(user_attended, item_attended, d, c);
            for (size_t p = 0; p < c.rows; ++p)
                for (size_t q = 0; q < c.columns; ++q)
                    *c.at(p, q) = mul(*c.at(p, q), mul(user_shorter[p], item_shorter[q]));
        }
        F sum = zero(), wrong = zero();
        for (size_t p = 0; p < c.rows; ++p) {
            sum = add(sum, best(p));
            for (size_t q = 0; q < c.columns; ++q) wrong = fma(*c.at(p, q), zero(), wrong);
        }
        return add(sum, wrong);  // a NaN that was not the most of its row
    }

    INLINE F best(size_t p) const {
        const F* row = cosines + p * lists.item_heads;
        F most = row[0];
        for (size_t q = 1; q < lists.item_heads; ++q) most = max(most, row[q]);
        return most;
    }

    // --- gradients

    // w of scores' gradients, in place of the cosines; of cross-attention divided by the lengths. m and n take the
    // places of the lengths.
    INLINE void choose(F gradient) {
        const bool cross = lists.kind == Kind::cross_attention;
        for (size_t q = 0; cross && q < lists.item_heads; ++q) of_item[q] = zero();
        for (size_t p = 0; p < lists.user_heads; ++p) {
            F* row = cosines + p * lists.item_heads;
            const F most = best(p);
            F count = zero();
            for (size_t q = 0; q < lists.item_heads; ++q)
                count = add(count, where_equal(row[q], most, broadcast(1.0f)));
            const F share = mul(gradient, reciprocal(count)), moved = mul(share, most);
            for (size_t q = 0; q < lists.item_heads; ++q) {
                const F hit = where_equal(row[q], most, broadcast(1.0f));
                if (cross) of_item[q] = fma(hit, moved, of_item[q]);
                row[q] = mul(hit, cross ? mul(share, mul(user_shorter[p], item_shorter[q])) : share);
            }
            if (cross) user_free[p] = mul(user_free[p], mul(gradient, most));
        }
        for (size_t q = 0; cross && q < lists.item_heads; ++q) item_free[q] = mul(item_free[q], of_item[q]);
    }

    INLINE void differentiate(const float* user, F gradient) {
        compare(user);
        choose(gradient);
        if (lists.kind == Kind::maxsim) {
            mix<true>(matrix(cosines), item, d, user_gradient);
            mix<false>(matrix(cosines).transposed(), user, d, item_gradient);
            return;
        }
        split_user(user);
        split_item();
        const F *e = item, *v = item_part(item, 1);
        const F factor = broadcast(1.0f / __builtin_sqrtf(float(d)));
        const Matrix x = matrix(slopes);
        dots(of_user, v, d, x);
        mix<false>(matrix(looks).transposed(), of_user, d, item_part(item_gradient, 1));
        differentiate_softmax(matrix(looks), x, factor);
        mix<true>(x, e, d, user_gradient + 3 * user_width);
        mix<true>(x.transposed(), user_part(user, 3), d, item_gradient);
        dots(user_part(user, 1), of_item, d, x);
        mix<true>(matrix(seen), of_item, d, user_gradient + user_width);
        differentiate_softmax(matrix(seen).transposed(), x.transposed(), factor);
        mix<true>(x, e, d, user_gradient + 4 * user_width);
        mix<true>(x.transposed(), user_part(user, 4), d, item_gradient);
    }

    INLINE void split_user(const float* user) {  // dU to dE, dG and dL
        mix<false>(matrix(cosines), item_attended, d, of_user);
        const float* g = user_part(user, 2);
        F *of_e = user_gradient, *of_g = user_gradient + 2 * user_width;
        for (size_t p = 0; p < lists.user_heads; ++p)
            for (size_t k = p * d; k < (p + 1) * d; ++k) {
                const F x = sub(of_user[k], mul(user_free[p], user_attended[k]));
                of_e[k] = add(of_e[k], x);
                of_g[k] = fma(x, user_looks[k], of_g[k]);
                of_user[k] = mul(x, number(g + k));
            }
    }

    INLINE void split_item() {  // dI to dE, dG and dK
        F *of_e = item_gradient, *of_g = item_part(item_gradient, 2);
        mix<false>(matrix(cosines).transposed(), user_attended, d, of_e);
        const F* g = item_part(item, 2);
        for (size_t q = 0; q < lists.item_heads; ++q)
            for (size_t k = q * d; k < (q + 1) * d; ++k) {
                const F x = sub(of_e[k], mul(item_free[q], item_attended[k]));
                of_e[k] = x;
                of_g[k] = mul(x, item_looks[k]);
                of_item[k] = mul(x, g[k]);
            }
    }
};

INLINE void take(const Lists& lists, int64_t row, Pairs& pairs) {
    pairs.rows[pairs.count] = row;
    pairs.records[pairs.count++] = lists.items + size_t(row) * lists.item_size();
}

INLINE void fill(Pairs& pairs) {
    for (size_t i = pairs.count; i < lanes; ++i) pairs.records[i] = pairs.records[pairs.count - 1];
}

inline size_t lists_room(const Lists& lists) { return sizeof(F) * Work::room(lists); }

inline void score_lists(const Lists& lists, size_t first, size_t last, void* room, float* scores, float* biases) {
    Work work(lists, (F*)room);
    for (size_t l = first; l < last; ++l) {
        const int64_t* chosen = lists.chosen + l * lists.entries;
        for (size_t start = 0; start < lists.entries; start += lanes) {
            Pairs pairs;
            pairs.count = 0;
            for (size_t i = start; i < lists.entries && i < start + lanes; ++i) take(lists, chosen[i], pairs);
            fill(pairs);
            work.read(pairs);
            float found[lanes];
            store(found, work.compare(lists.users + l * lists.user_size()));
            for (size_t i = 0; i < pairs.count; ++i) {
                scores[l * lists.entries + start + i] = found[i];
                if (lists.bias) biases[l * lists.entries + start + i] = pairs.records[i][lists.vectors_size()];
            }
        }
    }
}

inline void differentiate_lists(const Lists& lists, size_t first, size_t last, void* room, const float* of_scores,
                                const float* of_biases, float* of_users, float* of_items) {
    Work work(lists, (F*)room);
    for (size_t l = first; l < last; ++l) {
        const int64_t* chosen = lists.chosen + l * lists.entries;
        const float* gradients = of_scores + l * lists.entries;
        for (size_t k = 0; k < whole(lists.user_size()); ++k) work.user_gradient[k] = zero();
        for (size_t i = 0; i < lists.entries;) {
            Pairs pairs;
            pairs.count = 0;
            float gradient[lanes] = {};
            for (; i < lists.entries && pairs.count < lanes; ++i) {
                if (gradients[i] == 0.0f) continue;  // padding, and pairs that no term of the loss looks at
                gradient[pairs.count] = gradients[i];
                take(lists, chosen[i], pairs);
            }
            if (!pairs.count) break;
            fill(pairs);
            work.read(pairs);
            work.differentiate(lists.users + l * lists.user_size(), load(gradient));
            work.add_items(pairs, of_items);
        }
        work.write_user(of_users + l * lists.user_size());
        for (size_t i = 0; lists.bias && i < lists.entries; ++i)
            of_items[(size_t(chosen[i]) + 1) * lists.item_size() - 1] += of_biases[l * lists.entries + i];
    }
}

}  // namespace ranktower::RANKTOWER_LEVEL
