#pragma once
// What both forms of the 8-bit kernel share: its buffer, and the rules for scales and rounding.

#include <cstddef>
#include <cstdint>

#include "optimizer/kernels/elements.h"
#include "optimizer/kernels/kernels.h"

namespace slidecore::kernels::SLIDECORE_KERNEL_SET {
namespace {

constexpr std::size_t group = moments8_group;
constexpr std::size_t prefetch_distance = 512;

// A group's new moments before they are quantised: the first, and the root of the second.
struct Fresh {
  alignas(64) float moment[group];
  alignas(64) float root[group];
};

// 2^23 + 2^22: adding it leaves no room for a fraction, so that the addition rounds, half to even, and the sum's
// lowest bits are the whole number, of either sign.
constexpr float rounder = 12582912.f;

inline std::uint32_t rounded(float value) {
  return to_bits(value + rounder);
}

// The scale of a group whose largest magnitude has these bits. Reciprocals of what is flushed here would overflow.
inline float scale_of(std::uint32_t largest) {
  const float scale = one_nan(from_bits(largest));
  return scale < 0x1p-126f ? 0.f : scale;
}

inline bool usable(float scale) {
  return scale > 0.f && scale < __builtin_inff();
}

}  // namespace
}  // namespace slidecore::kernels::SLIDECORE_KERNEL_SET
