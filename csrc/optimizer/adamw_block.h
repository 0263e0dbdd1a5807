#pragma once
// The update without its threads, for callers that divide the work themselves.

#include <cstddef>
#include <cstdint>

#include "optimizer/kernels/kernels.h"
#include "slidecore/optimizer.h"

namespace slidecore {

// Parameters per block of work: the streams of a block (26 bytes per parameter) stay well inside a core's L2, and
// a block takes long enough that handing it out costs nothing.
inline constexpr std::size_t adamw_block_size = std::size_t{1} << 14;

// Throws Error(invalid_argument) for a value outside what torch.optim.AdamW accepts.
kernels::Scalars adamw_scalars(const AdamWHyper& hyper);

// Throws Error(invalid_argument) for missing, doubly given or misaligned planes. For n = 0 anything is fine.
void check_planes(const AdamWPlanes& planes, std::size_t n);
void check_gradient(const void* gradient, GradientType type, std::size_t n);

inline bool aligned(const void* pointer, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0;
}

template <typename T>
T* shifted(T* plane, std::size_t elements) {
  return plane == nullptr ? nullptr : plane + elements;
}

inline std::size_t gradient_bytes(GradientType type) {
  return type == GradientType::bfloat16 ? 2 : 4;
}

// Updates elements [begin, end) of the planes; `gradient` holds the element `gradient_begin` at its start. With 8-bit
// moments `begin` begins a group.
// To be called in a DefaultFloatEnvironment.
void adamw_block(const kernels::Table& table, const kernels::Scalars& scalars, const AdamWPlanes& planes,
                 const void* gradient, std::size_t gradient_begin, GradientType type, std::size_t begin,
                 std::size_t end);

}  // namespace slidecore
