// Ids to rows: open addressing with linear probing over a power of two of slots, at most a quarter full.
//
//   slots (m,) u32: row + 1, 0 is empty      keys (n,) u64: the int64 id, or the salted hash of a text
//   a key starts at mix(key) & (m - 1); mix is the finaliser of splitmix64 (Steele, Lea & Flood, OOPSLA 2014)
//   h(text): h = mix(salt ^ octets), then h = mix(h ^ w) for each little-endian word of 8, the last padded with zeros
//
// A lookup is two cache misses, slot and key, and both are prefetched 16 ids ahead: 5,000 ids of a million take 50 us,
// 100 us in passes over blocks of 64. A quarter full, because every collision is one more miss that nothing announced:
// at half full it takes 78 us. Equal hashes of texts prove nothing: the stored text is compared. Portable code: misses
// bound it, not instructions.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ranktower {

struct Texts {  // n texts anywhere in one buffer
    const uint8_t* data;
    const int64_t* starts;
    const int64_t* sizes;
};

struct Index {
    const uint32_t* slots;
    uint64_t mask;  // slots - 1
    const uint64_t* keys;
    uint64_t count;
    const uint64_t* offsets;  // (n + 1,) into `text`; null with integer ids
    const uint8_t* text;
    uint64_t salt;
};

// Fills `slots`, zeroed and mask + 1 long. Returns count, or the row whose key was there already.
size_t build_index(const uint64_t* keys, size_t count, uint32_t* slots, uint64_t mask);

void lookup(const Index& index, const int64_t* ids, size_t count, int32_t* rows);  // -1 where unknown
void lookup(const Index& index, const Texts& ids, size_t count, int32_t* rows);

void hash_texts(const Texts& texts, size_t count, uint64_t salt, uint64_t* keys);

}  // namespace ranktower
