#include "optimizer/moments8.h"

#include "optimizer/adamw_block.h"
#include "slidecore/status.h"

namespace slidecore {

static_assert(kernels::moments8_group == moments_group);

void check_moments(const AdamWPlanes& planes) {
  const bool float32 = planes.exp_avg != nullptr && planes.exp_avg_sq != nullptr;
  const bool any_float32 = planes.exp_avg != nullptr || planes.exp_avg_sq != nullptr;
  const bool eight_bit = planes.exp_avg8 != nullptr && planes.exp_avg_sq8 != nullptr &&
                         planes.exp_avg_scale != nullptr && planes.exp_avg_sq_scale != nullptr;
  if (!(float32 && !has_moments8(planes)) && !(eight_bit && !any_float32)) {
    throw Error(Code::invalid_argument,
                "adamw: give either the planes exp_avg and exp_avg_sq, or all of exp_avg8, exp_avg_sq8, exp_avg_scale "
                "and exp_avg_sq_scale");
  }
  if (!aligned(planes.exp_avg, 4) || !aligned(planes.exp_avg_sq, 4) || !aligned(planes.exp_avg_scale, 4) ||
      !aligned(planes.exp_avg_sq_scale, 4)) {
    throw Error(Code::invalid_argument, "adamw: a plane of moments does not start at a multiple of its element size");
  }
}

kernels::Planes8 planes8_from(const AdamWPlanes& planes, std::size_t begin) {
  return {shifted(planes.weight, begin),
          shifted(planes.residual, begin),
          shifted(planes.weight32, begin),
          planes.exp_avg8 + begin,
          planes.exp_avg_sq8 + begin,
          planes.exp_avg_scale + begin / moments_group,
          planes.exp_avg_sq_scale + begin / moments_group};
}

}  // namespace slidecore
