#pragma once
// What the update needs to know of 8-bit moments outside of the kernels.

#include <cstddef>

#include "optimizer/kernels/kernels.h"
#include "slidecore/optimizer.h"

namespace slidecore {

inline bool has_moments8(const AdamWPlanes& planes) {
  return planes.exp_avg8 != nullptr || planes.exp_avg_sq8 != nullptr || planes.exp_avg_scale != nullptr ||
         planes.exp_avg_sq_scale != nullptr;
}

// Parameters that one call of the kernel must not separate.
inline std::size_t indivisible(const AdamWPlanes& planes) {
  return has_moments8(planes) ? moments_group : 1;
}

// Throws Error(invalid_argument) unless the moments are given in exactly one form, aligned.
void check_moments(const AdamWPlanes& planes);

// The planes from element `begin` on, which begins a group.
kernels::Planes8 planes8_from(const AdamWPlanes& planes, std::size_t begin);

}  // namespace slidecore
