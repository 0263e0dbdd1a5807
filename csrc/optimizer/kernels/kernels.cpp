// Compiled once per instruction set (cmake/instruction_sets.cmake), as namespace SLIDECORE_KERNEL_SET.
// Plain loops for the vectoriser. Only operations that IEEE 754 rounds correctly, one at a time, so lane width
// cannot change a bit.

#include "optimizer/kernels/kernels.h"

#include "optimizer/kernels/elements.h"

namespace slidecore::kernels::SLIDECORE_KERNEL_SET {
namespace {

// Five streams cross a page border every few thousand parameters, where the processor's own prefetch stops.
constexpr std::size_t stride = 64;
constexpr std::size_t prefetch_distance = 512;

template <bool Split, typename Gradient>
inline void loop(const Scalars s, const Gradient* __restrict gradient, std::uint16_t* __restrict weight,
                 std::int16_t* __restrict residual, float* __restrict weight32, float* __restrict exp_avg,
                 float* __restrict exp_avg_sq, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const float g = load(gradient[i]) * s.gradient_factor;
    float p;
    if constexpr (Split) {
      p = from_bits(joined(weight[i], residual[i]));
    } else {
      p = weight32[i];
    }
    p *= s.decay;
    const float m_old = exp_avg[i];
    const float m = (s.lerp_from_gradient ? g : m_old) + s.lerp_factor * (g - m_old);
    // Association as in torch's addcmul, (value * g) * g, and addcdiv, (value * m) / denominator.
    const float v = exp_avg_sq[i] * s.beta2 + s.one_minus_beta2 * g * g;
    const float denominator = __builtin_sqrtf(v) / s.bias_correction2_sqrt + s.eps;
    p = one_nan(p + s.minus_step_size * m / denominator);
    exp_avg[i] = one_nan(m);
    exp_avg_sq[i] = one_nan(v);
    if constexpr (Split) {
      const std::uint32_t bits = to_bits(p);
      weight[i] = high_part(bits);
      residual[i] = low_part(bits);
    } else {
      weight32[i] = p;
    }
  }
}

template <bool Split, typename Gradient>
void adamw(const Scalars& scalars, const Planes& planes, const void* gradient_plane, std::size_t n) {
  const Gradient* gradient = static_cast<const Gradient*>(gradient_plane);
  auto [weight, residual, weight32, exp_avg, exp_avg_sq] = planes;
  while (n >= stride) {
    if (n > prefetch_distance) {
      prefetch<stride>(gradient + prefetch_distance);
      if constexpr (Split) {
        prefetch<stride>(weight + prefetch_distance);
        prefetch<stride>(residual + prefetch_distance);
      } else {
        prefetch<stride>(weight32 + prefetch_distance);
      }
      prefetch<stride>(exp_avg + prefetch_distance);
      prefetch<stride>(exp_avg_sq + prefetch_distance);
    }
    // The constant count lets the compiler drop the loop's checks and remainders.
    loop<Split>(scalars, gradient, weight, residual, weight32, exp_avg, exp_avg_sq, stride);
    gradient += stride;
    if constexpr (Split) {
      weight += stride;
      residual += stride;
    } else {
      weight32 += stride;
    }
    exp_avg += stride;
    exp_avg_sq += stride;
    n -= stride;
  }
  loop<Split>(scalars, gradient, weight, residual, weight32, exp_avg, exp_avg_sq, n);
}

// As many running sums as an AVX-512 loop wants, added up in one order at the end: lane width cannot change a bit.
constexpr std::size_t running_sums = 32;

template <bool First, typename Gradient>
double accumulate(float* __restrict sum, const Gradient* __restrict gradient, std::size_t n) {
  double squares[running_sums] = {};
  std::size_t i = 0;
  for (; i + running_sums <= n; i += running_sums) {
    for (std::size_t j = 0; j < running_sums; ++j) {
      const float total = First ? load(gradient[i + j]) : sum[i + j] + load(gradient[i + j]);
      sum[i + j] = total;
      squares[j] += static_cast<double>(total) * static_cast<double>(total);
    }
  }
  for (std::size_t j = 0; i < n; ++i, ++j) {
    const float total = First ? load(gradient[i]) : sum[i] + load(gradient[i]);
    sum[i] = total;
    squares[j] += static_cast<double>(total) * static_cast<double>(total);
  }
  double all = 0;
  for (const double part : squares) all += part;
  return all;
}

template <typename Gradient>
double accumulate(float* sum, const void* gradient, std::size_t n, bool first) {
  const Gradient* values = static_cast<const Gradient*>(gradient);
  return first ? accumulate<true>(sum, values, n) : accumulate<false>(sum, values, n);
}

void split(const float* __restrict master, std::uint16_t* __restrict weight, std::int16_t* __restrict residual,
           std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t bits = to_bits(master[i]);
    weight[i] = high_part(bits);
    residual[i] = low_part(bits);
  }
}

void merge(const std::uint16_t* __restrict weight, const std::int16_t* __restrict residual, float* __restrict master,
           std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) master[i] = from_bits(joined(weight[i], residual[i]));
}

#define SLIDECORE_QUOTE_(x) #x
#define SLIDECORE_QUOTE(x) SLIDECORE_QUOTE_(x)

}  // namespace

const Table table = {
    SLIDECORE_QUOTE(SLIDECORE_KERNEL_SET),
    adamw<true, std::uint16_t>,
    adamw<true, float>,
    adamw<false, std::uint16_t>,
    adamw<false, float>,
    accumulate<std::uint16_t>,
    accumulate<float>,
    split,
    merge,
    &table8,
};

}  // namespace slidecore::kernels::SLIDECORE_KERNEL_SET
