// AdamW on 8-bit moments (docs/numerics.md has the format), compiled once per instruction set like kernels.cpp.
//
// A group is updated in two passes, because its scales are known only when all of its new moments are. They wait in a
// buffer of the first cache level, unquantised, and the weights are updated from them.

#include "optimizer/kernels/moments8.h"

#include "optimizer/kernels/elements.h"
#include "optimizer/kernels/kernels.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define SLIDECORE_AVX512_MOMENTS8
#include "optimizer/kernels/moments8_avx512.h"
#endif

namespace slidecore::kernels::SLIDECORE_KERNEL_SET {
namespace {

// Updates the weights of a group of n elements, writes its new scales and leaves its new moments in `fresh`.
// Not inlined, nor are the two below: the compiler would lose sight of what does not overlap, and the vector code.
template <bool Split, typename Gradient>
[[gnu::noinline]] void update(const Scalars s, const Gradient* __restrict gradient, std::uint16_t* __restrict weight,
                              std::int16_t* __restrict residual, float* __restrict weight32,
                              const std::int8_t* __restrict exp_avg, const std::uint8_t* __restrict exp_avg_sq,
                              float* __restrict exp_avg_scale, float* __restrict exp_avg_sq_scale,
                              float* __restrict fresh_moment, float* __restrict fresh_root, std::size_t n) {
  const float scale = *exp_avg_scale;
  const float step = *exp_avg_sq_scale * (1.f / 255.f);
  // A mask, because a loop of this length is not split in two, and a branch would keep it from being vector code.
  const std::uint32_t from_gradient = s.lerp_from_gradient ? ~0u : 0u;
  // As integers, magnitudes order like the numbers, and every NaN lies above infinity.
  std::uint32_t largest_moment = 0;
  std::uint32_t largest_root = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const float g = load(gradient[i]) * s.gradient_factor;
    float p;
    if constexpr (Split) {
      p = from_bits(joined(weight[i], residual[i]));
    } else {
      p = weight32[i];
    }
    p *= s.decay;
    const float y = static_cast<float>(exp_avg[i]) * (1.f / 127.f);
    const float m_old = y / (2.f - __builtin_fabsf(y)) * scale;
    const float root_old = static_cast<float>(exp_avg_sq[i]) * step;
    const float m =
        from_bits((to_bits(g) & from_gradient) | (to_bits(m_old) & ~from_gradient)) + s.lerp_factor * (g - m_old);
    const float v = root_old * root_old * s.beta2 + s.one_minus_beta2 * g * g;
    const float root = __builtin_sqrtf(v);
    const float denominator = root / s.bias_correction2_sqrt + s.eps;
    p = one_nan(p + s.minus_step_size * m / denominator);
    if constexpr (Split) {
      const std::uint32_t bits = to_bits(p);
      weight[i] = high_part(bits);
      residual[i] = low_part(bits);
    } else {
      weight32[i] = p;
    }
    fresh_moment[i] = m;
    fresh_root[i] = root;
    const std::uint32_t moment_bits = to_bits(m) & 0x7fffffffu;
    const std::uint32_t root_bits = to_bits(root) & 0x7fffffffu;
    largest_moment = largest_moment < moment_bits ? moment_bits : largest_moment;
    largest_root = largest_root < root_bits ? root_bits : largest_root;
  }
  *exp_avg_scale = scale_of(largest_moment);
  *exp_avg_sq_scale = scale_of(largest_root);
}

[[gnu::noinline]] void quantise_moment(const float* __restrict moment, float scale, std::int8_t* __restrict code,
                                       std::size_t n) {
  if (!usable(scale)) {  // 0, infinity or NaN: y of the formula is nowhere finite but where it is 0
    for (std::size_t i = 0; i < n; ++i) code[i] = 0;
    return;
  }
  const float inverse = 1.f / scale;
  for (std::size_t i = 0; i < n; ++i) {
    const float x = moment[i] * inverse;
    const float y = (x + x) / (1.f + __builtin_fabsf(x));
    code[i] = static_cast<std::int8_t>(rounded(127.f * y));
  }
}

// The formula's upper limit of 255 needs no code: root <= scale, so root * (255 / scale) stays below 255.0001.
[[gnu::noinline]] void quantise_root(const float* __restrict root, float scale, std::uint8_t* __restrict code,
                                     std::size_t n) {
  if (!usable(scale)) {
    // 255 / infinity is 0: what is finite rounds to 0, and keeps the 1 that says it is not zero.
    const bool infinite = scale == __builtin_inff();
    for (std::size_t i = 0; i < n; ++i) code[i] = infinite && root[i] > 0.f && root[i] < __builtin_inff() ? 1 : 0;
    return;
  }
  const float inverse = 255.f / scale;
  for (std::size_t i = 0; i < n; ++i) {
    const float t = root[i] * inverse;
    const float least = root[i] > 0.f ? 1.f : 0.f;
    code[i] = static_cast<std::uint8_t>(rounded(t > least ? t : least));
  }
}

template <bool Split, typename Gradient>
inline void update_some(const Scalars& scalars, const Gradient* gradient, const Planes8& planes, Fresh& fresh,
                        std::size_t n) {
  update<Split>(scalars, gradient, planes.weight, planes.residual, planes.weight32, planes.exp_avg, planes.exp_avg_sq,
                planes.exp_avg_scale, planes.exp_avg_sq_scale, fresh.moment, fresh.root, n);
}

inline void quantise_some(const Fresh& fresh, const Planes8& planes, std::size_t n) {
  quantise_moment(fresh.moment, *planes.exp_avg_scale, planes.exp_avg, n);
  quantise_root(fresh.root, *planes.exp_avg_sq_scale, planes.exp_avg_sq, n);
}

template <bool Split, typename Gradient>
inline void update_whole(const Scalars& scalars, const Gradient* gradient, const Planes8& planes, Fresh& fresh) {
#ifdef SLIDECORE_AVX512_MOMENTS8
  avx512_moments8::update_whole<Split>(scalars, gradient, planes, fresh);
#else
  update_some<Split>(scalars, gradient, planes, fresh, group);
#endif
}

inline void quantise_whole(const Fresh& fresh, const Planes8& planes) {
#ifdef SLIDECORE_AVX512_MOMENTS8
  if (usable(*planes.exp_avg_scale) && usable(*planes.exp_avg_sq_scale)) {
    avx512_moments8::quantise_whole(fresh, planes);
    return;
  }
#endif
  quantise_some(fresh, planes, group);
}

template <bool Split, typename Gradient>
inline void prefetch_group(const Gradient* gradient, const Planes8& planes) {
  prefetch<group>(gradient + prefetch_distance);
  if constexpr (Split) {
    prefetch<group>(planes.weight + prefetch_distance);
    prefetch<group>(planes.residual + prefetch_distance);
  } else {
    prefetch<group>(planes.weight32 + prefetch_distance);
  }
  prefetch<group>(planes.exp_avg + prefetch_distance);
  prefetch<group>(planes.exp_avg_sq + prefetch_distance);
}

template <bool Split>
inline Planes8 next_group(const Planes8& planes) {
  Planes8 next = planes;
  if constexpr (Split) {
    next.weight += group;
    next.residual += group;
  } else {
    next.weight32 += group;
  }
  next.exp_avg += group;
  next.exp_avg_sq += group;
  ++next.exp_avg_scale;
  ++next.exp_avg_sq_scale;
  return next;
}

template <bool Split, typename Gradient>
void adamw8(const Scalars& scalars, const Planes8& first, const void* gradient_plane, std::size_t n) {
  const Gradient* gradient = static_cast<const Gradient*>(gradient_plane);
  Planes8 planes = first;
  Fresh fresh, other;
  // Two groups at a time: one's sums are under way while the other's scales, which its codes wait for, are found.
  for (; n >= 2 * group; n -= 2 * group) {
    const Planes8 second = next_group<Split>(planes);
    if (n > prefetch_distance + 2 * group) {
      prefetch_group<Split>(gradient, planes);
      prefetch_group<Split>(gradient + group, second);
    }
    update_whole<Split>(scalars, gradient, planes, fresh);
    update_whole<Split>(scalars, gradient + group, second, other);
    quantise_whole(fresh, planes);
    quantise_whole(other, second);
    gradient += 2 * group;
    planes = next_group<Split>(second);
  }
  if (n >= group) {
    update_whole<Split>(scalars, gradient, planes, fresh);
    quantise_whole(fresh, planes);
    gradient += group;
    planes = next_group<Split>(planes);
    n -= group;
  }
  if (n > 0) {
    update_some<Split>(scalars, gradient, planes, fresh, n);
    quantise_some(fresh, planes, n);
  }
}

}  // namespace

const Table8 table8 = {
    adamw8<true, std::uint16_t>,
    adamw8<true, float>,
    adamw8<false, std::uint16_t>,
    adamw8<false, float>,
};

}  // namespace slidecore::kernels::SLIDECORE_KERNEL_SET
