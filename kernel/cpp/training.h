// What training scores: lists of pairs of plain f32 records, laid out as the towers make them (kernel/head.py).

#pragma once

#include <cstddef>
#include <cstdint>

#include "record.h"

namespace ranktower {

struct Lists {
    Kind kind;
    size_t user_heads, item_heads, dim;
    bool bias;  // the last number of an item's record
    size_t count, entries;
    const float* users;     // (count, user_size)
    const float* items;     // (anything, item_size)
    const int64_t* chosen;  // (count, entries) rows of items

    size_t user_size() const { return (kind == Kind::maxsim ? 1 : 5) * user_heads * dim; }
    size_t vectors_size() const { return (kind == Kind::maxsim ? 1 : 3) * item_heads * dim; }
    size_t item_size() const { return vectors_size() + bias; }
};

struct Level;

// scores[l, i] = sum_p max_q of the similarity; biases (count, entries) where items have one.
void score_lists(const Level& level, const Lists& lists, int threads, float* scores, float* biases);

// From the gradients of what score_lists gives to those of users (count, user_size) and of item_count items. The same
// for the same number of threads, bit for bit.
void differentiate_lists(const Level& level, const Lists& lists, int threads, const float* of_scores,
                         const float* of_biases, size_t item_count, float* of_users, float* of_items);

}  // namespace ranktower
