// One request whole: ids to rows, rows to scores, scores to the k best, in one pass over blocks of 256 candidates.
//
// While a block is scored, the records of the next one, looked up before it, are already on their way from memory. The
// clock is read between blocks; when the deadline has passed, what follows is left unscored.

#pragma once

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

// find(start, count, rows) looks up candidates [start, start + count).
template <class Find>
Ranked rank(const Level& level, const Shape& shape, const void* prepared, const uint8_t* table, Find find, size_t count,
            size_t k, int64_t deadline_ns) {
    Ranked ranked;
    k = k < count ? k : count;
    TopK best(k);
    std::vector<int32_t> rows(count), positions(count);  // of known candidates, in the caller's order
    std::vector<float> scores(rank_block);
    size_t looked_up = 0, known = 0, scored = 0;
    const auto look_up = [&] {
        const size_t n = count - looked_up < rank_block ? count - looked_up : rank_block;
        int32_t found[rank_block];
        find(looked_up, n, found);
        for (size_t i = 0; i < n; ++i) {
            rows[known] = found[i];
            positions[known] = int32_t(looked_up + i);
            if (found[i] >= 0) ++known;
            else ranked.missing.push_back(int32_t(looked_up + i));
        }
        looked_up += n;
    };
    for (size_t known_before = 0; ranked.seen < count;) {
        if (is_over(deadline_ns)) break;
        if (looked_up == ranked.seen) look_up(), known_before = known;
        const size_t seen = looked_up, end = known_before;
        if (looked_up < count) look_up();
        while (scored < end) {
            const size_t n = end - scored < rank_block ? end - scored : rank_block;
            level.score(shape, prepared, table, rows.data() + scored, n, known - scored, scores.data());
            best.add(scores.data(), positions.data() + scored, n);
            scored += n;
        }
        ranked.seen = seen, known_before = known;
    }
    while (!ranked.missing.empty() && size_t(ranked.missing.back()) >= ranked.seen) ranked.missing.pop_back();
    ranked.positions.resize(k), ranked.scores.resize(k);
    const size_t n = best.finish(ranked.positions.data(), ranked.scores.data());
    ranked.positions.resize(n), ranked.scores.resize(n);
    return ranked;
}

}  // namespace ranktower
