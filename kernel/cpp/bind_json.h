// The Python side of json_candidates.h.

#pragma once

#include <nanobind/nanobind.h>

namespace ranktower {

void bind_json(nanobind::module_& m);

}  // namespace ranktower
