#include "level.h"

namespace ranktower {

size_t levels(const Level* const** all) {
    static const Level* const compiled[] = {
        &portable_level,
#ifdef RANKTOWER_X86
        &avx2_level,
        &avx512_level,
        &avx512_vnni_level,
#endif
    };
    *all = compiled;
    return sizeof compiled / sizeof *compiled;
}

}  // namespace ranktower
