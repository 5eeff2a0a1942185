#include "training.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "level.h"

namespace ranktower {
namespace {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Room = std::unique_ptr<void, Free>;

Room make_room(size_t bytes) {
    Room room(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!room) throw std::bad_alloc();
    return room;
}

// run(part, first, last) for each of `parts` nearly equal parts of `count`, each in a thread of its own.
template <class Run>
void share(size_t count, size_t parts, Run run) {
    const auto part = [&](size_t i) { run(i, count * i / parts, count * (i + 1) / parts); };
    std::vector<std::thread> others;
    others.reserve(parts);
    for (size_t i = 1; i < parts; ++i) try {
            others.emplace_back(part, i);
        } catch (const std::system_error&) {  // no more threads to be had
            part(i);
        }
    part(0);
    for (std::thread& other : others) other.join();
}

size_t parts_of(const Lists& lists, int threads) {
    const size_t most = threads > 1 ? size_t(threads) : 1;
    return lists.count < most ? (lists.count ? lists.count : 1) : most;
}

}  // namespace

void score_lists(const Level& level, const Lists& lists, int threads, float* scores, float* biases) {
    const size_t parts = parts_of(lists, threads);
    std::vector<Room> rooms;
    for (size_t i = 0; i < parts; ++i) rooms.push_back(make_room(level.lists_room(lists)));
    share(lists.count, parts, [&](size_t i, size_t first, size_t last) {
        level.score_lists(lists, first, last, rooms[i].get(), scores, biases);
    });
}

// Each thread adds to item gradients of its own, which are then added up in the order of threads: nothing depends on
// which of them was faster.
void differentiate_lists(const Level& level, const Lists& lists, int threads, const float* of_scores,
                         const float* of_biases, size_t item_count, float* of_users, float* of_items) {
    const size_t parts = parts_of(lists, threads), size = item_count * lists.item_size();
    std::vector<Room> rooms, sums;
    for (size_t i = 0; i < parts; ++i) rooms.push_back(make_room(level.lists_room(lists)));
    for (size_t i = 1; i < parts; ++i) sums.push_back(make_room(4 * size));
    const auto sum_of = [&](size_t i) { return i ? (float*)sums[i - 1].get() : of_items; };
    share(lists.count, parts, [&](size_t i, size_t first, size_t last) {
        std::memset(sum_of(i), 0, 4 * size);
        level.differentiate_lists(lists, first, last, rooms[i].get(), of_scores, of_biases, of_users, sum_of(i));
    });
    if (parts == 1) return;
    share(size, parts, [&](size_t, size_t first, size_t last) {
        for (size_t i = 1; i < parts; ++i) {
            const float* from = sum_of(i);
            for (size_t at = first; at < last; ++at) of_items[at] += from[at];
        }
    });
}

}  // namespace ranktower
