#pragma once
// What every instruction set provides. The kernels' source includes nothing but this: an inline function of a
// standard header, compiled there for AVX-512, could be the copy the linker keeps for the whole program.

#include <cstddef>
#include <cstdint>

namespace slidecore::kernels {

struct Planes {
  std::uint16_t* weight;
  std::int16_t* residual;
  float* weight32;
  float* exp_avg;
  float* exp_avg_sq;
};

// AdamWHyper as the elementwise loop wants it: computed in double, then rounded to float.
struct Scalars {
  float gradient_factor;  // gradient_scale, negated for maximize; x1 changes no bit
  float decay;            // 1 - lr * weight_decay; exactly 1 without decay
  float lerp_factor;      // of (g - m): 1 - beta1, or -beta1 if lerp_from_gradient
  bool lerp_from_gradient;
  float beta2;
  float one_minus_beta2;
  float bias_correction2_sqrt;
  float eps;
  float minus_step_size;
};

using AdamW = void (*)(const Scalars&, const Planes&, const void* gradient, std::size_t n);

// Parameters that share a scale of 8-bit moments.
constexpr std::size_t moments8_group = 128;

// With 8-bit moments. The first element begins a group.
struct Planes8 {
  std::uint16_t* weight;
  std::int16_t* residual;
  float* weight32;
  std::int8_t* exp_avg;
  std::uint8_t* exp_avg_sq;
  float* exp_avg_scale;
  float* exp_avg_sq_scale;
};

using AdamW8 = void (*)(const Scalars&, const Planes8&, const void* gradient, std::size_t n);

struct Table8 {
  AdamW8 split_bfloat16;
  AdamW8 split_float32;
  AdamW8 whole_bfloat16;
  AdamW8 whole_float32;
};

// sum = gradient (first) or sum += gradient; returns the sum of the results' squares, in a fixed order.
using Accumulate = double (*)(float* sum, const void* gradient, std::size_t n, bool first);

struct Table {
  const char* name;
  AdamW split_bfloat16;  // weight + residual planes, bf16 gradient
  AdamW split_float32;   // weight + residual planes, fp32 gradient
  AdamW whole_bfloat16;  // weight32 plane
  AdamW whole_float32;
  Accumulate accumulate_bfloat16;
  Accumulate accumulate_float32;
  void (*split)(const float* master, std::uint16_t* weight, std::int16_t* residual, std::size_t n);
  void (*merge)(const std::uint16_t* weight, const std::int16_t* residual, float* master, std::size_t n);
  const Table8* moments8;
};

namespace generic {
extern const Table table;
extern const Table8 table8;
}  // namespace generic
namespace avx2 {
extern const Table table;
extern const Table8 table8;
}  // namespace avx2
namespace avx512 {
extern const Table table;
extern const Table8 table8;
}  // namespace avx512

}  // namespace slidecore::kernels
