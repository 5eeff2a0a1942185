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

inline uint16_t scale_of(const float* head, int dim) {  // infinite where no half is large enough
    float most = 0;
    for (int k = 0; k < dim; ++k) most = std::fmax(most, std::fabs(head[k]));
    const float wanted = most / 127.0f;
    uint16_t half = to_half(wanted);
    if (from_half(half) < wanted) ++half;
    return half;
}

// Writes one head of one part; false where a value does not fit.
bool pack_head(const Shape& s, const float* from, Part part, int head, uint8_t* row, uint16_t* scale) {
    for (int k = 0; k < s.dim; ++k)
        if (!std::isfinite(from[k])) return false;
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
    *scale = scale_of(from, s.dim);
    const float step = from_half(*scale);
    if (!std::isfinite(step)) return false;
    for (int k = 0; k < s.dim; ++k) {
        const float rounded = step > 0 ? std::nearbyint(from[k] / step) : 0.0f;
        to[place(s, part.in_quads, head, k)] = uint8_t(int8_t(std::fmin(std::fmax(rounded, -127.0f), 127.0f)));
    }
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
