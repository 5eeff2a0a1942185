#include "index.h"

#include <cstring>
#include <utility>
#include <vector>

namespace ranktower {
namespace {

constexpr size_t ahead = 32;   // ids between the prefetch of a bucket and its reading
constexpr size_t block = 256;  // texts hashed at a time

inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

inline uint64_t hash(const uint8_t* text, size_t size, uint64_t salt) {
    uint64_t h = mix(salt ^ size);
    for (size_t at = 0; at < size; at += 8) {
        uint64_t word = 0;
        std::memcpy(&word, text + at, size - at < 8 ? size - at : 8);
        h = mix(h ^ word);
    }
    return h;
}

inline uint64_t home(uint64_t key, uint64_t size) { return (mix(key) >> 32) * size >> 32; }

// Row + 1 of a key, 0 where the bucket does not hold it. An empty entry gives 0 even to the key 0.
inline uint32_t row_in(const Bucket& bucket, uint64_t key) {
    uint32_t row = 0;
    for (size_t i = 0; i < Bucket::entries; ++i) row |= bucket.rows[i] & -uint32_t(bucket.keys[i] == key);
    return row;
}

void find(const Index& index, const uint64_t* keys, size_t count, int32_t* rows) {
    uint32_t places[ahead];
    std::vector<std::pair<uint32_t, uint32_t>> gone_on;  // which key, and the bucket that it went on to
    for (size_t i = 0; i < count + ahead; ++i) {
        if (i >= ahead) {
            const size_t done = i - ahead;
            const uint32_t place = places[i % ahead];
            const Bucket& bucket = index.buckets[place];
            const uint32_t row = row_in(bucket, keys[done]);
            rows[done] = int32_t(row) - 1;
            if (!row && bucket.spilled) {
                const uint32_t next = place + 1 < index.size ? place + 1 : 0;
                __builtin_prefetch(index.buckets + next);
                gone_on.emplace_back(uint32_t(done), next);
            }
        }
        if (i < count) {
            places[i % ahead] = uint32_t(home(keys[i], index.size));
            __builtin_prefetch(index.buckets + places[i % ahead], 0, 3);
        }
    }
    for (auto [which, place] : gone_on)
        for (;;) {
            const Bucket& bucket = index.buckets[place];
            rows[which] = int32_t(row_in(bucket, keys[which])) - 1;
            if (rows[which] >= 0 || !bucket.spilled) break;
            place = place + 1 < index.size ? place + 1 : 0;
        }
}

}  // namespace

size_t build_index(const uint64_t* keys, size_t count, Bucket* buckets, uint64_t size) {
    for (size_t row = 0; row < count; ++row) {
        if (row + ahead < count) __builtin_prefetch(buckets + home(keys[row + ahead], size), 1);
        for (uint64_t at = home(keys[row], size);; at = at + 1 < size ? at + 1 : 0) {
            Bucket& bucket = buckets[at];
            if (row_in(bucket, keys[row])) return row;
            size_t used = 0;
            while (used < Bucket::entries && bucket.rows[used]) ++used;
            if (used < Bucket::entries) {
                bucket.keys[used] = keys[row], bucket.rows[used] = uint32_t(row) + 1;
                break;
            }
            bucket.spilled = 1;
        }
    }
    return count;
}

void lookup(const Index& index, const int64_t* ids, size_t count, int32_t* rows) {
    find(index, reinterpret_cast<const uint64_t*>(ids), count, rows);
}

void lookup(const Index& index, const Texts& ids, size_t count, int32_t* rows) {
    uint64_t keys[block];
    for (size_t start = 0; start < count; start += block) {
        const size_t n = count - start < block ? count - start : block;
        hash_texts({ids.data, ids.starts + start, ids.sizes + start}, n, index.salt, keys);
        find(index, keys, n, rows + start);
        for (size_t i = start; i < start + n; ++i)
            if (rows[i] >= 0) __builtin_prefetch(index.offsets + rows[i]);
        for (size_t i = start; i < start + n; ++i)
            if (rows[i] >= 0) __builtin_prefetch(index.text + index.offsets[rows[i]]);
        for (size_t i = start; i < start + n; ++i) {
            if (rows[i] < 0) continue;
            const uint64_t from = index.offsets[rows[i]], size = index.offsets[rows[i] + 1] - from;
            if (size != uint64_t(ids.sizes[i]) || std::memcmp(index.text + from, ids.data + ids.starts[i], size) != 0)
                rows[i] = -1;
        }
    }
}

void hash_texts(const Texts& texts, size_t count, uint64_t salt, uint64_t* keys) {
    for (size_t i = 0; i < count; ++i) keys[i] = hash(texts.data + texts.starts[i], size_t(texts.sizes[i]), salt);
}

}  // namespace ranktower
