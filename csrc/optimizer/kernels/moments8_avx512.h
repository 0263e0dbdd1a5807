#pragma once
// Whole groups by hand: the loops of moments8.cpp, with the same operations in the same order. What the compiler makes
// of those loops has one more division a parameter, and shuffles where a conversion would do.

// GCC 12 takes what its header leaves undefined on purpose for a mistake (bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstddef>
#include <cstdint>

#include "optimizer/kernels/kernels.h"
#include "optimizer/kernels/moments8.h"

namespace slidecore::kernels::SLIDECORE_KERNEL_SET::avx512_moments8 {
namespace {

inline __m512i bits_of(__m512 x) {
  return _mm512_castps_si512(x);
}
inline __m512 float_of(__m512i x) {
  return _mm512_castsi512_ps(x);
}
inline __m512 magnitude(__m512 x) {
  return float_of(_mm512_and_si512(bits_of(x), _mm512_set1_epi32(0x7fffffff)));
}

template <typename T>
inline __m256i sixteen_halves(const T* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
template <typename T>
inline __m128i sixteen_bytes(const T* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
template <typename T>
inline void store_halves(T* to, __m512i low_halves) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(low_halves));
}
template <typename T>
inline void store_bytes(T* to, __m512i low_bytes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(low_bytes));
}

inline __m512i high_halves(const std::uint16_t* from) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen_halves(from)), 16);
}
inline __m512 load16(const std::uint16_t* bfloat16) {
  return float_of(high_halves(bfloat16));
}
inline __m512 load16(const float* values) {
  return _mm512_loadu_ps(values);
}

// Division by one divisor, rounded as a division is: product with the rounded reciprocal, and a correction by the
// exact remainder (Brisebarre, Muller and Raina, "Accelerating Correctly Rounded Floating-Point Division when the
// Divisor Is Known in Advance", IEEE Trans. Computers 53(8), 2004). Holds where neither overflows nor underflows: the
// roots here are 0 or from 2^-75 to 2^64, the divisors from 2^-27 to 1. The limit keeps an infinite root infinite.
class Divisor {
 public:
  explicit Divisor(float divisor)
      : divisor_(_mm512_set1_ps(divisor)),
        reciprocal_(_mm512_set1_ps(1.f / divisor)),
        limit_(_mm512_set1_ps(0x1.fffffep127f)) {}
  __m512 of(__m512 dividend) const {
    const __m512 quotient = _mm512_min_ps(_mm512_mul_ps(dividend, reciprocal_), limit_);
    const __m512 remainder = _mm512_fnmadd_ps(quotient, divisor_, dividend);
    return _mm512_fmadd_ps(remainder, reciprocal_, quotient);
  }

 private:
  __m512 divisor_, reciprocal_, limit_;
};

template <bool Split, typename Gradient>
[[gnu::noinline]] void update_whole(const Scalars& s, const Gradient* gradient, const Planes8& planes, Fresh& fresh) {
  const __m512 scale = _mm512_set1_ps(*planes.exp_avg_scale);
  const __m512 step = _mm512_set1_ps(*planes.exp_avg_sq_scale * (1.f / 255.f));
  const __m512 gradient_factor = _mm512_set1_ps(s.gradient_factor), decay = _mm512_set1_ps(s.decay);
  const __m512 lerp_factor = _mm512_set1_ps(s.lerp_factor), beta2 = _mm512_set1_ps(s.beta2);
  const __m512 one_minus_beta2 = _mm512_set1_ps(s.one_minus_beta2), eps = _mm512_set1_ps(s.eps);
  const __m512 minus_step_size = _mm512_set1_ps(s.minus_step_size);
  const Divisor bias_correction2_sqrt(s.bias_correction2_sqrt);
  const __mmask16 from_gradient = s.lerp_from_gradient ? 0xffff : 0;
  __m512i largest_moment = _mm512_setzero_si512(), largest_root = _mm512_setzero_si512();
  for (std::size_t i = 0; i < group; i += 16) {
    const __m512 g = _mm512_mul_ps(load16(gradient + i), gradient_factor);
    __m512 p;
    if constexpr (Split) {
      const __m512i low = _mm512_cvtepi16_epi32(sixteen_halves(planes.residual + i));
      p = float_of(_mm512_add_epi32(high_halves(planes.weight + i), low));
    } else {
      p = load16(planes.weight32 + i);
    }
    p = _mm512_mul_ps(p, decay);
    const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen_bytes(planes.exp_avg + i))),
                                   _mm512_set1_ps(1.f / 127.f));
    const __m512 m_old = _mm512_mul_ps(_mm512_div_ps(y, _mm512_sub_ps(_mm512_set1_ps(2.f), magnitude(y))), scale);
    const __m512 root_old =
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen_bytes(planes.exp_avg_sq + i))), step);
    const __m512 m =
        _mm512_add_ps(_mm512_mask_mov_ps(m_old, from_gradient, g), _mm512_mul_ps(lerp_factor, _mm512_sub_ps(g, m_old)));
    const __m512 v = _mm512_add_ps(_mm512_mul_ps(_mm512_mul_ps(root_old, root_old), beta2),
                                   _mm512_mul_ps(_mm512_mul_ps(one_minus_beta2, g), g));
    const __m512 root = _mm512_sqrt_ps(v);
    const __m512 denominator = _mm512_add_ps(bias_correction2_sqrt.of(root), eps);
    p = _mm512_add_ps(p, _mm512_div_ps(_mm512_mul_ps(minus_step_size, m), denominator));
    const __m512i bits =
        _mm512_mask_mov_epi32(bits_of(p), _mm512_cmp_ps_mask(p, p, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    if constexpr (Split) {
      store_halves(planes.weight + i, _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16));
      store_halves(planes.residual + i, bits);
    } else {
      _mm512_storeu_ps(planes.weight32 + i, float_of(bits));
    }
    _mm512_store_ps(fresh.moment + i, m);
    _mm512_store_ps(fresh.root + i, root);
    largest_moment = _mm512_max_epu32(largest_moment, bits_of(magnitude(m)));
    largest_root = _mm512_max_epu32(largest_root, bits_of(root));  // never below 0, and a NaN of either sign is larger
  }
  *planes.exp_avg_scale = scale_of(_mm512_reduce_max_epu32(largest_moment));
  *planes.exp_avg_sq_scale = scale_of(_mm512_reduce_max_epu32(largest_root));
}

// For usable scales only.
[[gnu::noinline]] void quantise_whole(const Fresh& fresh, const Planes8& planes) {
  const __m512 inverse = _mm512_set1_ps(1.f / *planes.exp_avg_scale);
  const __m512 inverse_step = _mm512_set1_ps(255.f / *planes.exp_avg_sq_scale);
  const __m512 one = _mm512_set1_ps(1.f), to_round = _mm512_set1_ps(rounder);
  for (std::size_t i = 0; i < group; i += 16) {
    const __m512 x = _mm512_mul_ps(_mm512_load_ps(fresh.moment + i), inverse);
    const __m512 y = _mm512_div_ps(_mm512_add_ps(x, x), _mm512_add_ps(one, magnitude(x)));
    const __m512 code = _mm512_mul_ps(_mm512_set1_ps(127.f), y);
    store_bytes(planes.exp_avg + i, bits_of(_mm512_add_ps(code, to_round)));
    const __m512 root = _mm512_load_ps(fresh.root + i);
    const __m512 t = _mm512_mul_ps(root, inverse_step);
    const __m512 code_sq = _mm512_mask_max_ps(t, _mm512_cmp_ps_mask(root, _mm512_setzero_ps(), _CMP_GT_OQ), t, one);
    store_bytes(planes.exp_avg_sq + i, bits_of(_mm512_add_ps(code_sq, to_round)));
  }
}

}  // namespace
}  // namespace slidecore::kernels::SLIDECORE_KERNEL_SET::avx512_moments8
