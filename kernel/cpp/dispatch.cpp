#include <stdexcept>
#include <string>

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

const Level& level_of(const char* name) {
    const Level* const* all;
    const size_t count = levels(&all);
    const std::string wanted = name;
    for (size_t i = 0; i < count; ++i)
        if (wanted == all[i]->name) {
            if (!all[i]->supported()) throw std::invalid_argument("this processor has no " + wanted);
            return *all[i];
        }
    throw std::invalid_argument("there is no level '" + wanted + "' in this build");
}

}  // namespace ranktower
