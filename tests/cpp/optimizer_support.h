#pragma once
// Data and settings that the tests of the update share.

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "slidecore/optimizer.h"

namespace slidecore {

inline constexpr float infinity = std::numeric_limits<float>::infinity();
inline constexpr float nan = std::numeric_limits<float>::quiet_NaN();

inline std::uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (value != value) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float from_bfloat16(std::uint16_t value) {
  return std::bit_cast<float>(std::uint32_t{value} << 16);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

inline std::vector<AdamWHyper> hypers() {
  std::vector<AdamWHyper> list(6);
  list[1] = {.lr = 1e-5, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .gradient_scale = 0.37f};
  list[2] = {.lr = 3e-4, .beta1 = 0.95, .beta2 = 0.98, .eps = 1e-6, .weight_decay = 0, .maximize = true};
  list[3] = {.lr = 1e-3, .beta1 = 0.3, .beta2 = 0.5, .eps = 1e-5, .weight_decay = 0.5};  // lerp from the far end
  list[4] = {.lr = 1e-3, .beta1 = 0.0, .beta2 = 0.0, .eps = 1e-3, .weight_decay = 0.01};
  list[5] = {.lr = 0, .beta1 = 0.5, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1, .maximize = true};
  list[5].gradient_scale = 2.5f;
  return list;
}

inline std::vector<float> normal(std::mt19937& random, std::size_t n, float scale) {
  std::normal_distribution<float> distribution(0.f, scale);
  std::vector<float> values(n);
  for (float& value : values) value = distribution(random);
  return values;
}

// Every kind of float, as raw bits: normals of all sizes, denormals, zeros, infinities, NaNs of both kinds.
inline std::vector<float> wild(std::mt19937& random, std::size_t n) {
  const std::vector<float> special = {
      0.f,    -0.f,    infinity, -infinity, nan,      std::bit_cast<float>(0xffc12345u),
      1e-45f, -1e-40f, 3e38f,    -3e38f,    1.1e-38f, std::bit_cast<float>(0x7f812345u)};
  std::vector<float> values(n);
  for (float& value : values) {
    const auto bits = static_cast<std::uint32_t>(random());
    value = bits % 7 == 0 ? special[(bits / 7) % special.size()] : std::bit_cast<float>(bits);
  }
  return values;
}

class ForcedSet {
 public:
  explicit ForcedSet(const std::string& name) { force_instruction_set(name); }
  ~ForcedSet() { force_instruction_set(""); }
};

}  // namespace slidecore
