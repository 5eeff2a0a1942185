// The Python side of training.h.

#pragma once

#include <nanobind/nanobind.h>

namespace ranktower {

void bind_training(nanobind::module_& m);

}  // namespace ranktower
