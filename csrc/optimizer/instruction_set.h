#pragma once

#include "optimizer/kernels/kernels.h"

namespace slidecore {

// The kernels of instruction_set(). A caller fetches them once per piece of work, so that a change by
// force_instruction_set() never mixes two sets inside one update.
const kernels::Table& kernel_table();

}  // namespace slidecore
