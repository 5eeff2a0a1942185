// IEEE half precision in software, to nearest even: what packs records on any machine. Scoring uses the processor's
// own.

#pragma once

#include <cstdint>
#include <cstring>

namespace ranktower {

inline uint16_t to_half(float value) {
    uint32_t x;
    std::memcpy(&x, &value, 4);
    const uint32_t sign = (x >> 16) & 0x8000;
    x &= 0x7fffffff;
    if (x >= 0x7f800000) return uint16_t(sign | (x > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (x >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
    if (x < 0x38800000) {                                 // a subnormal half: let float addition do the rounding
        float magnitude;
        std::memcpy(&magnitude, &x, 4);
        magnitude += 0.5f;
        uint32_t bits;
        std::memcpy(&bits, &magnitude, 4);
        return uint16_t(sign | (bits - 0x3f000000));
    }
    x += 0xc8000fff + ((x >> 13) & 1);  // exponent from 127 to 15, and half a unit in the last place
    return uint16_t(sign | (x >> 13));
}

inline float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t rest = half & 0x7fff;
    float value;
    uint32_t bits;
    if (rest < 0x400) {
        value = float(rest) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
    } else {
        bits = (rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000);
    }
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace ranktower
