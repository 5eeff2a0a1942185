// One request whole: ids to rows, rows to scores, scores to the k best.
//
// All ids are looked up first, in one pipeline; scoring then goes in blocks of 256, between which the clock is read:
// when the deadline has passed, what follows is left unscored. (Looking up a block while the one before it is scored
// was slower: both wait for memory, and a pipeline that starts anew for every block runs empty in between.)

#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

#include "index.h"
#include "level.h"
#include "top_k.h"

namespace ranktower {

constexpr size_t rank_block = 256;

struct Ranked {
    std::vector<int32_t> positions;  // (k,) into the caller's list, best first
    std::vector<float> scores;       // (k,)
    std::vector<int32_t> missing;    // (m,) positions of unknown ids among those seen
    size_t seen = 0;                 // candidates looked up and, where known, scored: all, but for the deadline
};

// std::chrono::steady_clock, as Python's time.monotonic_ns and, on Linux, perf_counter_ns. 0: no deadline.
inline bool is_over(int64_t deadline_ns) {
    using namespace std::chrono;
    return deadline_ns && duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count() > deadline_ns;
}

// find(count, rows) looks up all candidates.
template <class Find>
Ranked rank(const Level& level, const Shape& shape, const void* prepared, const Records& from, Find find, size_t count,
            size_t k, int64_t deadline_ns) {
    Ranked ranked;
    k = k < count ? k : count;
    TopK best(k);
    if (is_over(deadline_ns)) count = 0;
    std::vector<int32_t> rows(count), positions;  // of all candidates; where some are unknown, of the known ones alone
    find(count, rows.data());
    size_t known = count;
    if (std::any_of(rows.begin(), rows.end(), [](int32_t row) { return row < 0; })) {
        known = 0;
        positions.resize(count);
        for (size_t i = 0; i < count; ++i) {
            rows[known] = rows[i];
            positions[known] = int32_t(i);
            if (rows[i] >= 0) ++known;
            else ranked.missing.push_back(int32_t(i));
        }
    }
    const auto position = [&](size_t i) { return positions.empty() ? int32_t(i) : positions[i]; };
    float scores[rank_block];
    ranked.seen = count;
    for (size_t scored = 0; scored < known; scored += rank_block) {
        if (is_over(deadline_ns)) {
            ranked.seen = size_t(position(scored));
            break;
        }
        const size_t n = known - scored < rank_block ? known - scored : rank_block;
        level.score(shape, prepared, from, rows.data() + scored, n, known - scored, scores);
        best.add(scores, [&](size_t i) { return position(scored + i); }, n);
    }
    while (!ranked.missing.empty() && size_t(ranked.missing.back()) >= ranked.seen) ranked.missing.pop_back();
    ranked.positions.resize(k), ranked.scores.resize(k);
    const size_t n = best.finish(ranked.positions.data(), ranked.scores.data());
    ranked.positions.resize(n), ranked.scores.resize(n);
    return ranked;
}

}  // namespace ranktower
