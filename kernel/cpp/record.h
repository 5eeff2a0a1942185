// The layout of one packed item record, and its only definition (kernel/record.py packs the same bytes in NumPy).
//
//   E        [dims/4][heads][4]    quads: four dimensions of head 0, of head 1, ..., then the next four
//   V        [heads][plain]        cross-attention only: head after head
//   G        [dims/4][heads][4]    cross-attention only
//   scales   [parts][heads] f16    int8 only: value = scale * int8
//   bias     f32                   where the head has one
//
// heads is item_heads rounded up to a power of two; what is added repeats the last head, so that no maximum changes.
// dims is dim rounded up so that heads * dims is a multiple of 16, plain is dim rounded up to 16; what is added is
// zero. The stride is a multiple of 16 octets: a record of 4 heads of 32 int8 with bias takes 144, always three cache
// lines; rounding up to 64 would take 192 for the same three.
//
// Quads put a whole head's part into one 128-bit quarter of a register, so that sixteen sums are reduced within
// quarters.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ranktower {

enum class Kind : int { maxsim, cross_attention };
enum class Dtype : int { f32, f16, int8 };

constexpr int max_user_heads = 32, max_item_heads = 16, min_dim = 1, max_dim = 1024, max_int8_dim = 256;

struct Shape {
    Kind kind;
    Dtype dtype;
    int user_heads, item_heads, dim;
    bool bias;
    float scale;  // 1/tau

    // derived, by make_shape alone
    int heads, dims, plain;                                // padded, see above
    int parts, user_size, item_size;                       // matrices of an item record; floats of unpacked records
    size_t v_at, g_at, scales_at, bias_at, bytes, stride;  // octets from the start of a record
};

// Where the record of a row lies. An overlay holds those from `count` on: records that came after the table was written.
struct Records {
    const uint8_t* table;
    size_t stride;
    int32_t count = 0x7fffffff;
    const uint8_t* overlay = nullptr;

    inline const uint8_t* at(int32_t row) const {
        const bool under = row < count;
        return (under ? table : overlay) + size_t(under ? row : row - count) * stride;
    }
};

// By its name in a manifest. Throws std::invalid_argument.
Kind kind_of(const char* name);

// Throws std::invalid_argument naming what is out of range.
Shape make_shape(Kind kind, Dtype dtype, int user_heads, int item_heads, int dim, bool bias, float scale);

}  // namespace ranktower
