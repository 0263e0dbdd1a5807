#pragma once
// Single elements of the planes, for the kernels' sources only: each instruction set has its own copy.

#include <cstddef>
#include <cstdint>

namespace slidecore::kernels::SLIDECORE_KERNEL_SET {
namespace {

inline float from_bits(std::uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
inline std::uint32_t to_bits(float value) {
  return __builtin_bit_cast(std::uint32_t, value);
}

inline float load(const std::uint16_t& bfloat16) {
  return from_bits(std::uint32_t{bfloat16} << 16);
}
inline float load(const float& value) {
  return value;
}

// Which NaN an operation returns depends on operand order, which the compiler may swap, and on the processor.
// One pattern for all keeps the results identical; it is also one whose bf16 half is still a NaN.
inline float one_nan(float value) {
  return value != value ? from_bits(0x7fc00000u) : value;
}

inline std::uint16_t high_part(std::uint32_t bits) {
  return static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
}
inline std::int16_t low_part(std::uint32_t bits) {
  return static_cast<std::int16_t>(bits & 0xffffu);
}
inline std::uint32_t joined(std::uint16_t weight, std::int16_t residual) {
  return (std::uint32_t{weight} << 16) + static_cast<std::uint32_t>(std::int32_t{residual});
}

template <std::size_t Elements, typename T>
inline void prefetch(const T* plane) {
  for (std::size_t i = 0; i < Elements; i += 64 / sizeof(T)) __builtin_prefetch(plane + i, 1);
}

}  // namespace
}  // namespace slidecore::kernels::SLIDECORE_KERNEL_SET
