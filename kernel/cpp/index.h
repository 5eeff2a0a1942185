// Ids to rows: buckets of one cache line, five entries each, about half full.
//
//   bucket   64 octets: five keys u64, five rows + 1 u32 (0 is empty), u32 1 if an entry had to go on from here
//   key      the int64 id, or the salted hash of a text
//   an entry belongs to bucket (mix(key) >> 32) * buckets >> 32, and goes on to the next while there is no room; mix is
//   the finaliser of splitmix64 (Steele, Lea & Flood, OOPSLA 2014)
//   h(text): h = mix(salt ^ octets), then h = mix(h ^ w) for each little-endian word of 8, the last padded with zeros
//
// A lookup is one cache miss, prefetched well ahead: key and row lie in the line that the hash names. At 2.5 entries a
// bucket one in forty has gone on; those are looked for at the end, side by side, in lines prefetched meanwhile. Equal
// hashes of texts prove nothing: the stored text is compared. Portable code: misses bound it, not instructions.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ranktower {

struct Texts {  // n texts anywhere in one buffer
    const uint8_t* data;
    const int64_t* starts;
    const int64_t* sizes;
};

struct Bucket {
    static constexpr size_t entries = 5;

    uint64_t keys[entries];
    uint32_t rows[entries];
    uint32_t spilled;
};

static_assert(sizeof(Bucket) == 64, "a bucket is a cache line");

struct Index {
    const Bucket* buckets;
    uint64_t size;            // buckets, fewer than 2^32
    uint64_t count;           // keys
    const uint64_t* offsets;  // (n + 1,) into `text`; null with integer ids
    const uint8_t* text;
    uint64_t salt;
};

// Fills `buckets`, zeroed. Returns count, or the row whose key was there already.
size_t build_index(const uint64_t* keys, size_t count, Bucket* buckets, uint64_t size);

void lookup(const Index& index, const int64_t* ids, size_t count, int32_t* rows);  // -1 where unknown
void lookup(const Index& index, const Texts& ids, size_t count, int32_t* rows);

// Rows of an overlay over those of a table with `count` rows: where the overlay knows the id, its row comes after the
// table's, or is unknown from its row `held` on: such ids have been deleted.
inline void lay_over(const int32_t* overlay, size_t ids, size_t count, size_t held, int32_t* rows) {
    for (size_t i = 0; i < ids; ++i)
        if (overlay[i] >= 0) rows[i] = size_t(overlay[i]) < held ? int32_t(count) + overlay[i] : -1;
}

void hash_texts(const Texts& texts, size_t count, uint64_t salt, uint64_t* keys);

}  // namespace ranktower
