// The k best of a stream of scores, best first; equal scores keep the order of their coming; NaN comes last.
//
// A score becomes a 64-bit key, its bits in falling order above its position, so that one integer comparison decides
// score and tie. Nearly all are turned away before that, by one comparison with the worst score that is kept: of 5,000
// scores in random order about 500 enter the buffer for k = 100, which is cut back to k whenever it is full. Portable.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace ranktower {

class TopK {
  public:
    explicit TopK(size_t k) : k_(k), full_(std::max<size_t>(2 * k, 64)) { keys_.reserve(full_); }

    // position(i) of score i, rising from call to call.
    template <class Position>
    void add(const float* scores, Position position, size_t count) {
        if (!k_) return;
        for (size_t i = 0; i < count; ++i) {
            if (scores[i] <= worst_) continue;  // an equal one that comes later, too; not NaN
            const uint64_t key = key_of(scores[i], position(i));
            if (key >= limit_) continue;
            keys_.push_back(key);
            if (keys_.size() == full_) cut();
        }
    }

    // Returns how many there are; positions and scores are k long at least.
    size_t finish(int32_t* positions, float* scores) {
        if (keys_.size() > k_) cut();
        std::sort(keys_.begin(), keys_.end());
        for (size_t i = 0; i < keys_.size(); ++i) {
            positions[i] = int32_t(uint32_t(keys_[i]));
            scores[i] = score_of(uint32_t(keys_[i] >> 32));
        }
        return keys_.size();
    }

  private:
    static uint64_t key_of(float score, int32_t position) {
        const float canonical = score + 0.0f;  // -0 equals 0
        uint32_t bits;
        std::memcpy(&bits, &canonical, 4);
        const uint32_t rising = bits & 0x80000000 ? ~bits : bits | 0x80000000;
        const uint32_t falling = score != score ? 0xffffffff : ~rising;
        return uint64_t(falling) << 32 | uint32_t(position);
    }

    static float score_of(uint32_t falling) {
        const uint32_t rising = ~falling, bits = rising & 0x80000000 ? rising & 0x7fffffff : ~rising;
        float score;
        std::memcpy(&score, &bits, 4);
        return score;
    }

    void cut() {
        std::nth_element(keys_.begin(), keys_.begin() + (k_ - 1), keys_.end());
        keys_.resize(k_);
        limit_ = keys_[k_ - 1];
        worst_ = score_of(uint32_t(limit_ >> 32));
    }

    size_t k_, full_;
    uint64_t limit_ = ~uint64_t(0);
    float worst_ = std::numeric_limits<float>::quiet_NaN();  // compares with nothing
    std::vector<uint64_t> keys_;
};

}  // namespace ranktower
