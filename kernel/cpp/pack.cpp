#include "pack.h"

#include <cmath>
#include <cstring>

#include "half.h"

namespace ranktower {
namespace {

struct Part {
    size_t at;      // octets from the start of the record
    bool in_quads;  // E and G; V lies head after head
};

Part part_of(const Shape& s, int part) {
    const size_t at[3] = {0, s.v_at, s.g_at};
    return {at[part], part != 1};
}

inline size_t place(const Shape& s, bool in_quads, int head, int k) {
    return in_quads ? (size_t(k / 4) * s.heads + head) * 4 + k % 4 : size_t(head) * s.plain + k;
}

// The largest magnitude of a head, as its bits: these order finite numbers as their values do, and every compiler makes
// a vector loop of integers. From 0x7f800000 on something is not finite.
inline int32_t largest_bits(const float* head, int dim) {
    int32_t most = 0;
    for (int k = 0; k < dim; ++k) {
        int32_t bits;
        std::memcpy(&bits, &head[k], 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

inline uint16_t scale_of(int32_t largest) {  // infinite where no half is large enough
    float most;
    std::memcpy(&most, &largest, 4);
    const float wanted = most / 127.0f;
    uint16_t half = to_half(wanted);
    if (from_half(half) < wanted) ++half;
    return half;
}

// values / step, rounded to the nearest, ties to even. Adding 1.5 * 2^23 leaves no bits below one, so the addition does
// the rounding: a vector loop also where the processor's own rounding may not be assumed, 4 times as fast as a call.
inline void quantise(const float* values, int dim, float step, int8_t* to) {
    constexpr float whole = 12582912.0f;
    for (int k = 0; k < dim; ++k) {
        float rounded = (values[k] / step + whole) - whole;
        rounded = rounded > 127.0f ? 127.0f : rounded;
        rounded = rounded < -127.0f ? -127.0f : rounded;
        to[k] = int8_t(int32_t(rounded));
    }
}

// Writes one head of one part; false where a value does not fit.
bool pack_head(const Shape& s, const float* from, Part part, int head, uint8_t* row, uint16_t* scale) {
    const int32_t largest = largest_bits(from, s.dim);
    if (largest >= 0x7f800000) return false;
    uint8_t* to = row + part.at;
    if (s.dtype == Dtype::f32) {
        for (int k = 0; k < s.dim; ++k) std::memcpy(to + 4 * place(s, part.in_quads, head, k), &from[k], 4);
        return true;
    }
    if (s.dtype == Dtype::f16) {
        bool fits = true;
        for (int k = 0; k < s.dim; ++k) {
            const uint16_t half = to_half(from[k]);
            fits &= (half & 0x7fff) < 0x7c00;
            std::memcpy(to + 2 * place(s, part.in_quads, head, k), &half, 2);
        }
        return fits;
    }
    *scale = scale_of(largest);
    const float step = from_half(*scale);
    if (!std::isfinite(step)) return false;
    if (step == 0) return true;  // the row is zero already
    int8_t values[max_int8_dim];
    quantise(from, s.dim, step, values);
    int k = 0;
    for (; part.in_quads && k + 4 <= s.dim; k += 4) std::memcpy(to + place(s, true, head, k), values + k, 4);
    for (; k < s.dim; ++k) to[place(s, part.in_quads, head, k)] = uint8_t(values[k]);
    return true;
}

}  // namespace

size_t pack(const Shape& s, const float* records, size_t count, uint8_t* rows) {
    for (size_t i = 0; i < count; ++i) {
        const float* record = records + i * s.item_size;
        uint8_t* row = rows + i * s.stride;
        std::memset(row, 0, s.stride);
        for (int part = 0; part < s.parts; ++part)
            for (int head = 0; head < s.heads; ++head) {
                const int from = part * s.item_heads + (head < s.item_heads ? head : s.item_heads - 1);
                uint16_t scale = 0;
                if (!pack_head(s, record + size_t(from) * s.dim, part_of(s, part), head, row, &scale)) return i;
                if (s.dtype == Dtype::int8) std::memcpy(row + s.scales_at + 2 * (part * s.heads + head), &scale, 2);
            }
        if (s.bias) {
            if (!std::isfinite(record[s.item_size - 1])) return i;
            std::memcpy(row + s.bias_at, record + s.item_size - 1, 4);
        }
    }
    return count;
}

void unpack(const Shape& s, const Records& packed, const int32_t* index, size_t count, float* records) {
    for (size_t i = 0; i < count; ++i) {
        const uint8_t* row = packed.at(index[i]);
        float* record = records + i * s.item_size;
        for (int part = 0; part < s.parts; ++part)
            for (int head = 0; head < s.item_heads; ++head) {
                const Part p = part_of(s, part);
                float* to = record + size_t(part * s.item_heads + head) * s.dim;
                uint16_t half = 0;
                if (s.dtype == Dtype::int8) std::memcpy(&half, row + s.scales_at + 2 * (part * s.heads + head), 2);
                const float scale = from_half(half);
                for (int k = 0; k < s.dim; ++k) {
                    const uint8_t* from = row + p.at;
                    const size_t at = place(s, p.in_quads, head, k);
                    if (s.dtype == Dtype::f32) {
                        std::memcpy(&to[k], from + 4 * at, 4);
                    } else if (s.dtype == Dtype::f16) {
                        std::memcpy(&half, from + 2 * at, 2);
                        to[k] = from_half(half);
                    } else {
                        to[k] = scale * float(int8_t(from[at]));
                    }
                }
            }
        if (s.bias) std::memcpy(record + s.item_size - 1, row + s.bias_at, 4);
    }
}

}  // namespace ranktower
