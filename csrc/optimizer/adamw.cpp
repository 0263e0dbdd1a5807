#include <cmath>
#include <cstdint>
#include <string>

#include "optimizer/adamw_block.h"
#include "optimizer/float_environment.h"
#include "optimizer/instruction_set.h"
#include "optimizer/moments8.h"
#include "slidecore/optimizer.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

[[noreturn]] void refuse(const char* what, double value, const char* wanted) {
  throw Error(Code::invalid_argument,
              std::string("adamw: ") + what + " is " + std::to_string(value) + ", must be " + wanted);
}

// Not inlined: the compiler knows nothing of the environment and might compute before it is set.
[[gnu::noinline]] kernels::Scalars rounded_scalars(const AdamWHyper& hyper) {
  const double step = static_cast<double>(hyper.step);
  const double bias_correction1 = 1 - std::pow(hyper.beta1, step);
  const double bias_correction2 = 1 - std::pow(hyper.beta2, step);
  kernels::Scalars scalars{};
  scalars.gradient_factor = hyper.maximize ? -hyper.gradient_scale : hyper.gradient_scale;
  scalars.decay = static_cast<float>(1 - hyper.lr * hyper.weight_decay);
  // torch's lerp counts from the nearer end: m + w (g - m) for w < 1/2, else g - (g - m)(1 - w).
  const float lerp_weight = static_cast<float>(1 - hyper.beta1);
  scalars.lerp_from_gradient = lerp_weight >= 0.5f;
  scalars.lerp_factor = scalars.lerp_from_gradient ? lerp_weight - 1.f : lerp_weight;
  scalars.beta2 = static_cast<float>(hyper.beta2);
  scalars.one_minus_beta2 = static_cast<float>(1 - hyper.beta2);
  scalars.bias_correction2_sqrt = static_cast<float>(std::sqrt(bias_correction2));
  scalars.eps = static_cast<float>(hyper.eps);
  scalars.minus_step_size = static_cast<float>(-(hyper.lr / bias_correction1));
  return scalars;
}

}  // namespace

kernels::Scalars adamw_scalars(const AdamWHyper& hyper) {
  if (!(hyper.lr >= 0)) refuse("lr", hyper.lr, "0 or more");
  if (!(hyper.beta1 >= 0 && hyper.beta1 < 1)) refuse("beta1", hyper.beta1, "in [0, 1)");
  if (!(hyper.beta2 >= 0 && hyper.beta2 < 1)) refuse("beta2", hyper.beta2, "in [0, 1)");
  if (!(hyper.eps >= 0)) refuse("eps", hyper.eps, "0 or more");
  if (!(hyper.weight_decay >= 0)) refuse("weight_decay", hyper.weight_decay, "0 or more");
  if (hyper.step < 1) refuse("step", static_cast<double>(hyper.step), "1 or more (this update included)");

  const DefaultFloatEnvironment environment;
  return rounded_scalars(hyper);
}

void check_planes(const AdamWPlanes& planes, std::size_t n) {
  if (n == 0) return;
  const bool split = planes.weight != nullptr && planes.residual != nullptr && planes.weight32 == nullptr;
  const bool whole = planes.weight == nullptr && planes.residual == nullptr && planes.weight32 != nullptr;
  if (!split && !whole) {
    throw Error(Code::invalid_argument, "adamw: give either the planes weight and residual, or weight32 alone");
  }
  if (!aligned(planes.weight, 2) || !aligned(planes.residual, 2) || !aligned(planes.weight32, 4)) {
    throw Error(Code::invalid_argument, "adamw: a plane does not start at a multiple of its element size");
  }
  check_moments(planes);
}

void check_gradient(const void* gradient, GradientType type, std::size_t n) {
  if (n == 0) return;
  if (gradient == nullptr) throw Error(Code::invalid_argument, "adamw: the gradient is null");
  if (!aligned(gradient, gradient_bytes(type))) {
    throw Error(Code::invalid_argument, "adamw: the gradient does not start at a multiple of its element size");
  }
}

void adamw_block(const kernels::Table& table, const kernels::Scalars& scalars, const AdamWPlanes& planes,
                 const void* gradient, std::size_t gradient_begin, GradientType type, std::size_t begin,
                 std::size_t end) {
  const void* first = static_cast<const char*>(gradient) + (begin - gradient_begin) * gradient_bytes(type);
  const bool bfloat16 = type == GradientType::bfloat16;
  // One of the forms that both tables have, in their order.
  const auto run = [&](const auto& kernels, const auto& from_begin) {
    const auto kernel = planes.weight32 == nullptr ? (bfloat16 ? kernels.split_bfloat16 : kernels.split_float32)
                                                   : (bfloat16 ? kernels.whole_bfloat16 : kernels.whole_float32);
    kernel(scalars, from_begin, first, end - begin);
  };
  if (has_moments8(planes)) {
    run(*table.moments8, planes8_from(planes, begin));
  } else {
    run(table, kernels::Planes{shifted(planes.weight, begin), shifted(planes.residual, begin),
                               shifted(planes.weight32, begin), planes.exp_avg + begin, planes.exp_avg_sq + begin});
  }
}

void adamw(ThreadPool& pool, const AdamWHyper& hyper, const AdamWPlanes& planes, const void* gradient,
           GradientType type, std::size_t n) {
  const kernels::Scalars scalars = adamw_scalars(hyper);
  check_planes(planes, n);
  check_gradient(gradient, type, n);
  const kernels::Table& table = kernel_table();
  pool.run(n, adamw_block_size, [&](std::size_t begin, std::size_t end) {
    const DefaultFloatEnvironment environment;
    adamw_block(table, scalars, planes, gradient, 0, type, begin, end);
  });
}

}  // namespace slidecore
