// What is compiled once for each instruction set, and how the best one that this processor has is found.
//
//   portable       whatever the compiler makes of 128-bit vectors: SSE2 on x86-64, NEON on ARM
//   avx2           AVX2, FMA, F16C
//   avx512         AVX-512 F, BW, DQ, VL
//   avx512-vnni    the same, and VPDPBUSD for int8

#pragma once

#include "record.h"
#include "training.h"

namespace ranktower {

struct Level {
    const char* name;
    bool (*supported)();

    // Octets of a user made ready for scoring, and the making: user (user_size,) f32, prepared aligned to 64 octets.
    size_t (*prepared_bytes)(const Shape&);
    void (*prepare)(const Shape&, const float* user, void* prepared);

    // scores[i] of row rows[i] of the records; every row is there. Those up to rows[soon - 1] are prefetched for a next
    // call.
    void (*score)(const Shape&, const void* prepared, const Records&, const int32_t* rows, size_t count, size_t soon,
                  float* scores);

    // Adds up one octet of every cache line that `score` reads, with its prefetch: the floor that memory sets.
    uint64_t (*touch)(const Shape&, const Records&, const int32_t* rows, size_t count);

    // For training, see training.h: lists first to last - 1, in a room of lists_room octets aligned to 64. Gradients of
    // users are written, those of items added.
    size_t (*lists_room)(const Lists&);
    void (*score_lists)(const Lists&, size_t first, size_t last, void* room, float* scores, float* biases);
    void (*differentiate_lists)(const Lists&, size_t first, size_t last, void* room, const float* of_scores,
                                const float* of_biases, float* of_users, float* of_items);
};

extern const Level portable_level;
#ifdef RANKTOWER_X86
extern const Level avx2_level, avx512_level, avx512_vnni_level;
#endif

// Levels compiled in, worst first.
size_t levels(const Level* const** all);

// The one of that name. Throws std::invalid_argument where there is none or this processor cannot run it.
const Level& level_of(const char* name);

}  // namespace ranktower
