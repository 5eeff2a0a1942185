// Pack and unpack item records: floats as the item tower writes them <-> the layout of record.h.
//
//   f32    as it is               f16    rounded to nearest even
//   int8   per head: scale = the smallest f16 not below max|v| / 127;  q = round(v / scale) within -127..127
//
// Portable code: it moves 128 floats a record and is bound by the tower before it.

#pragma once

#include "record.h"

namespace ranktower {

// records (count, item_size) f32 -> rows (count, stride). Returns the first record with a NaN, an infinity or a value
// that the dtype cannot hold, or count where there is none; rows from there on are not written.
size_t pack(const Shape& shape, const float* records, size_t count, uint8_t* rows);

// Rows at `index` (count,) -> records (count, item_size) f32. Indices have been checked.
void unpack(const Shape& shape, const Records& from, const int32_t* index, size_t count, float* records);

}  // namespace ranktower
