#include "index.h"

#include <cstring>

namespace ranktower {
namespace {

constexpr size_t ahead = 16;  // ids between a slot's prefetch and its reading, and from there to the key's reading
constexpr size_t ring = 2 * ahead;
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

// One pipeline over all keys: while the slot of one is on its way, the key that an earlier slot points to is, too.
void find(const Index& index, const uint64_t* keys, size_t count, int32_t* rows) {
    uint64_t places[ring];
    uint32_t slots[ring];
    for (size_t i = 0; i < count + 2 * ahead; ++i) {
        if (i >= 2 * ahead) {
            const size_t done = i - 2 * ahead;
            uint64_t place = places[done % ring];
            uint32_t slot = slots[done % ring];
            while (slot && index.keys[slot - 1] != keys[done]) {
                place = (place + 1) & index.mask;
                slot = index.slots[place];
            }
            rows[done] = int32_t(slot) - 1;
        }
        if (i >= ahead && i - ahead < count) {
            const size_t here = (i - ahead) % ring;
            slots[here] = index.slots[places[here]];
            if (slots[here]) __builtin_prefetch(index.keys + (slots[here] - 1));
        }
        if (i < count) {
            places[i % ring] = mix(keys[i]) & index.mask;
            __builtin_prefetch(index.slots + places[i % ring]);
        }
    }
}

}  // namespace

size_t build_index(const uint64_t* keys, size_t count, uint32_t* slots, uint64_t mask) {
    for (size_t row = 0; row < count; ++row) {
        if (row + ahead < count) __builtin_prefetch(slots + (mix(keys[row + ahead]) & mask), 1);
        uint64_t at = mix(keys[row]) & mask;
        while (slots[at]) {
            if (keys[slots[at] - 1] == keys[row]) return row;
            at = (at + 1) & mask;
        }
        slots[at] = uint32_t(row) + 1;
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
