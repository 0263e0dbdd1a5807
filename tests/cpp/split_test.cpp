#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "slidecore/optimizer.h"

namespace slidecore {
namespace {

// A chunk of every stride-th, and the last one.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint64_t chunk = std::uint64_t{1} << 14;
constexpr std::uint64_t chunk_stride =
    509;  // a subset that still meets every exponent (512 chunks), both signs, the wraps
#else
constexpr std::uint64_t chunk = std::uint64_t{1} << 16;
constexpr std::uint64_t chunk_stride = 1;  // every pattern
#endif
constexpr std::uint64_t chunks = (std::uint64_t{1} << 32) / chunk;

std::uint64_t chunk_after(std::uint64_t c) {
  return c + 1 == chunks ? chunks : std::min(c + chunk_stride, chunks - 1);
}

// Independent of the kernels: the header's formula in 64-bit arithmetic.
std::uint16_t reference_weight(std::uint32_t bits) {
  return static_cast<std::uint16_t>(((std::uint64_t{bits} + 0x8000u) >> 16) & 0xffffu);
}

class EverySet : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { force_instruction_set(GetParam()); }
  void TearDown() override { force_instruction_set(""); }
};

TEST_P(EverySet, SplitThenMergeIsExactForEveryPattern) {
  ThreadPool pool(2);
  std::vector<float> master(chunk), back(chunk);
  std::vector<std::uint16_t> weight(chunk);
  std::vector<std::int16_t> residual(chunk);
  for (std::uint64_t c = 0; c < chunks; c = chunk_after(c)) {
    for (std::uint64_t i = 0; i < chunk; ++i) {
      const auto bits = static_cast<std::uint32_t>(c * chunk + i);
      std::memcpy(&master[i], &bits, 4);  // not through a float value: a signalling NaN must stay one
    }
    split(pool, master.data(), weight.data(), residual.data(), chunk);
    std::uint32_t wrong = 0;
    for (std::uint64_t i = 0; i < chunk; ++i) {
      const auto bits = static_cast<std::uint32_t>(c * chunk + i);
      wrong |= static_cast<std::uint32_t>(weight[i] ^ reference_weight(bits));
      wrong |= static_cast<std::uint16_t>(residual[i]) ^ (bits & 0xffffu);
    }
    ASSERT_EQ(wrong, 0u) << "split, patterns from " << c * chunk;
    merge(pool, weight.data(), residual.data(), back.data(), chunk);
    ASSERT_EQ(std::memcmp(master.data(), back.data(), chunk * 4), 0) << "merge, patterns from " << c * chunk;
  }
}

// The other direction: all 2^32 pairs (weight, residual) are some float's planes, and come back the same.
TEST_P(EverySet, MergeThenSplitIsExactForEveryPair) {
  ThreadPool pool(2);
  std::vector<float> master(chunk);
  std::vector<std::uint16_t> weight(chunk), weight_back(chunk);
  std::vector<std::int16_t> residual(chunk), residual_back(chunk);
  for (std::uint64_t c = 0; c < chunks; c = chunk_after(c)) {
    for (std::uint64_t i = 0; i < chunk; ++i) {
      const std::uint64_t pair = c * chunk + i;
      weight[i] = static_cast<std::uint16_t>(pair >> 16);
      residual[i] = static_cast<std::int16_t>(pair & 0xffffu);
    }
    merge(pool, weight.data(), residual.data(), master.data(), chunk);
    split(pool, master.data(), weight_back.data(), residual_back.data(), chunk);
    ASSERT_EQ(std::memcmp(weight.data(), weight_back.data(), chunk * 2), 0) << "pairs from " << c * chunk;
    ASSERT_EQ(std::memcmp(residual.data(), residual_back.data(), chunk * 2), 0) << "pairs from " << c * chunk;
  }
}

TEST_P(EverySet, OddSizesAndOffsetsTouchNothingElse) {
  ThreadPool pool(2);
  constexpr std::size_t room = 70000;
  for (const std::size_t n : {0, 1, 15, 16, 17, 31, 33, 4095, 65537}) {
    for (const std::size_t offset : {0, 1, 3, 7}) {
      std::vector<float> master(room), back(room, -1.f);
      for (std::size_t i = 0; i < room; ++i) master[i] = std::sin(static_cast<float>(i) * 1.7f);
      std::vector<std::uint16_t> weight(room, 0xabcd);
      std::vector<std::int16_t> residual(room, 0x1234);
      split(pool, master.data() + offset, weight.data() + offset, residual.data() + offset, n);
      merge(pool, weight.data() + offset, residual.data() + offset, back.data() + offset, n);
      for (std::size_t i = 0; i < room; ++i) {
        const bool inside = i >= offset && i < offset + n;
        ASSERT_EQ(back[i], inside ? master[i] : -1.f) << n << " " << offset << " " << i;
        if (!inside) {
          ASSERT_EQ(weight[i], 0xabcd);
          ASSERT_EQ(residual[i], 0x1234);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Split, EverySet, ::testing::ValuesIn(available_instruction_sets()),
                         [](const auto& param) { return param.param; });

TEST(SplitMeaning, WeightIsTheNearestBfloat16) {
  ThreadPool pool(1);
  const std::vector<float> master = {1.f, -1.f, 1.00390625f, 0.1f, -3.14159265f, 1e-40f, 65504.f, 0.f, -0.f};
  for (const float value : master) {
    std::uint16_t weight = 0;
    std::int16_t residual = 0;
    split(pool, &value, &weight, &residual, 1);
    const auto at = [](std::uint32_t high) { return std::bit_cast<float>(high << 16); };
    const float distance = std::fabs(at(weight) - value);
    EXPECT_LE(distance, std::fabs(at(weight + 1u) - value));
    if ((weight & 0x7fff) != 0) {
      EXPECT_LE(distance, std::fabs(at(weight - 1u) - value));
    }
    EXPECT_EQ(std::signbit(at(weight)), std::signbit(value));
  }
}

TEST(SplitMeaning, EdgesOfTheFormat) {
  ThreadPool pool(1);
  const auto weight_of = [&](std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    std::uint16_t weight = 0;
    std::int16_t residual = 0;
    split(pool, &value, &weight, &residual, 1);
    return weight;
  };
  EXPECT_EQ(weight_of(0x7f800000u), 0x7f80);  // infinity
  EXPECT_EQ(weight_of(0x7f7fffffu), 0x7f80);  // the largest float rounds to infinity in bf16; its residual is -1
  EXPECT_EQ(weight_of(0x7fc00000u), 0x7fc0);  // the usual NaN stays one
  EXPECT_EQ(weight_of(0x7fff8000u), 0x8000);  // NaN patterns from here on wrap: exact, but no NaN as a bf16
  EXPECT_EQ(weight_of(0xffffffffu), 0x0000);
}

}  // namespace
}  // namespace slidecore
