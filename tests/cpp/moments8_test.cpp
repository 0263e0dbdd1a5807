#include <gtest/gtest.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "optimizer_support.h"
#include "slidecore/adamw_sink.h"
#include "slidecore/optimizer.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

constexpr std::size_t group = moments_group;

std::size_t groups_of(std::size_t n) {
  return (n + group - 1) / group;
}

// Planes of n parameters with 8-bit moments, in one of the two forms of weights, and a gradient in both types.
struct State {
  bool split_planes;
  std::vector<std::uint16_t> weight, gradient16;
  std::vector<std::int16_t> residual;
  std::vector<float> weight32, gradient32;
  std::vector<std::int8_t> code;
  std::vector<std::uint8_t> code_sq;
  std::vector<float> scale, scale_sq;

  State(ThreadPool& pool, bool split_form, const std::vector<float>& master)
      : split_planes(split_form),
        code(master.size()),
        code_sq(master.size()),
        scale(groups_of(master.size())),
        scale_sq(groups_of(master.size())) {
    if (split_planes) {
      weight.resize(master.size());
      residual.resize(master.size());
      split(pool, master.data(), weight.data(), residual.data(), master.size());
    } else {
      weight32 = master;
    }
  }

  AdamWPlanes planes(std::size_t offset = 0) {
    AdamWPlanes result;
    if (split_planes) {
      result.weight = weight.data() + offset;
      result.residual = residual.data() + offset;
    } else {
      result.weight32 = weight32.data() + offset;
    }
    result.exp_avg8 = code.data() + offset;
    result.exp_avg_sq8 = code_sq.data() + offset;
    result.exp_avg_scale = scale.data() + offset / group;
    result.exp_avg_sq_scale = scale_sq.data() + offset / group;
    return result;
  }

  void set_gradient(const std::vector<float>& gradient) {
    gradient32 = gradient;
    gradient16.resize(gradient.size());
    std::transform(gradient.begin(), gradient.end(), gradient16.begin(), to_bfloat16);
  }
  const void* gradient(GradientType type, std::size_t offset = 0) const {
    if (type == GradientType::bfloat16) return gradient16.data() + offset;
    return gradient32.data() + offset;
  }

  std::vector<float> master(ThreadPool& pool) const {
    if (!split_planes) return weight32;
    std::vector<float> result(weight.size());
    merge(pool, weight.data(), residual.data(), result.data(), result.size());
    return result;
  }

  bool operator==(const State& other) const {
    return weight == other.weight && residual == other.residual && same_bits(weight32, other.weight32) &&
           code == other.code && code_sq == other.code_sq && same_bits(scale, other.scale) &&
           same_bits(scale_sq, other.scale_sq);
  }
};

// The format as docs/numerics.md has it, one rounding at a time.
float dequantised(int code, float scale) {
  const volatile float y = static_cast<float>(code) * (1.f / 127.f);
  const volatile float below = 2.f - std::fabs(y);
  const volatile float x = y / below;
  return x * scale;
}

float dequantised_root(unsigned code, float scale) {
  const volatile float step = scale * (1.f / 255.f);
  return static_cast<float>(code) * step;
}

float largest_magnitude(const std::vector<float>& values) {
  float largest = 0;
  for (const float value : values) {
    if (std::isnan(value)) return nan;
    largest = std::max(largest, std::fabs(value));
  }
  return largest < std::ldexp(1.f, -126) ? 0.f : largest;
}

int quantised(float m, float scale) {
  if (scale == 0) return 0;
  const volatile float inverse = 1.f / scale;
  const volatile float x = m * inverse;
  const volatile float twice = x + x;
  const volatile float above = 1.f + std::fabs(x);
  const volatile float y = twice / above;
  if (!std::isfinite(y)) return 0;
  const volatile float wanted = 127.f * y;
  return static_cast<int>(std::nearbyint(wanted));
}

unsigned quantised_root(float root, float scale) {
  if (scale == 0) return 0;
  const volatile float inverse = 255.f / scale;
  const volatile float wanted = root * inverse;
  if (!std::isfinite(wanted)) return 0;
  return static_cast<unsigned>(std::min(255.f, std::max(std::nearbyint(wanted), root > 0 ? 1.f : 0.f)));
}

// AdamW of torch's single-tensor path on the dequantised moments; the new ones are returned unquantised.
void scalar_update(const AdamWHyper& h, float& p, float& m, float& root, float g) {
  const double step = static_cast<double>(h.step);
  const volatile float scaled = g * h.gradient_scale;
  g = h.maximize ? -scaled : scaled;
  const volatile double decay = h.lr * h.weight_decay;
  const volatile float decayed = p * static_cast<float>(1 - decay);
  const auto weight = static_cast<float>(1 - h.beta1);
  const volatile float difference = g - m;
  const volatile float product = (weight < 0.5f ? weight : weight - 1.f) * difference;
  m = (weight < 0.5f ? m : g) + product;
  const volatile float square = root * root;
  const volatile float kept = square * static_cast<float>(h.beta2);
  const volatile float first = static_cast<float>(1 - h.beta2) * g;
  const volatile float second = first * g;
  const volatile float v = kept + second;
  root = std::sqrt(v);
  const volatile float divided = root / static_cast<float>(std::sqrt(1 - std::pow(h.beta2, step)));
  const volatile float denominator = divided + static_cast<float>(h.eps);
  const volatile float numerator = static_cast<float>(-(h.lr / (1 - std::pow(h.beta1, step)))) * m;
  const volatile float update = numerator / denominator;
  p = decayed + update;
  if (std::isnan(p)) p = std::bit_cast<float>(0x7fc00000u);
}

// One step of the reference on the same planes.
void reference_step(ThreadPool& pool, const AdamWHyper& hyper, State& state, const std::vector<float>& gradient) {
  std::vector<float> master = state.master(pool);
  for (std::size_t begin = 0; begin < master.size(); begin += group) {
    const std::size_t end = std::min(begin + group, master.size());
    std::vector<float> moments, roots;
    for (std::size_t i = begin; i < end; ++i) {
      float m = dequantised(state.code[i], state.scale[i / group]);
      float root = dequantised_root(state.code_sq[i], state.scale_sq[i / group]);
      scalar_update(hyper, master[i], m, root, gradient[i]);
      moments.push_back(m);
      roots.push_back(root);
    }
    const float scale = largest_magnitude(moments), scale_sq = largest_magnitude(roots);
    for (std::size_t i = begin; i < end; ++i) {
      state.code[i] = static_cast<std::int8_t>(quantised(moments[i - begin], scale));
      state.code_sq[i] = static_cast<std::uint8_t>(quantised_root(roots[i - begin], scale_sq));
    }
    state.scale[begin / group] = scale;
    state.scale_sq[begin / group] = scale_sq;
  }
  if (state.split_planes) {
    split(pool, master.data(), state.weight.data(), state.residual.data(), master.size());
  } else {
    state.weight32 = master;
  }
}

// Values whose size differs from group to group, over the whole range of float32; some groups of zeros, and some with
// zeros, infinities or NaNs among numbers.
std::vector<float> by_group(std::mt19937& random, std::size_t n) {
  std::vector<float> values = normal(random, n, 1.f);
  const std::vector<float> anything = wild(random, n);
  for (std::size_t begin = 0; begin < n; begin += group) {
    const unsigned kind = random() % 12;
    const int exponent = static_cast<int>(random() % 280) - 150;
    for (std::size_t i = begin; i < std::min(begin + group, n); ++i) {
      values[i] = kind < 5    ? values[i] * 1e-3f
                  : kind == 5 ? 0.f
                  : kind == 6 ? (random() % 16 == 0 ? values[i] : 0.f)
                  : kind == 7 ? anything[i]
                              : std::ldexp(values[i], exponent);
    }
    if (kind == 8) values[begin + random() % std::min(group, n - begin)] = infinity;
    if (kind == 9) values[begin + random() % std::min(group, n - begin)] = nan;
  }
  return values;
}

// Moments that a training could have left behind, the broken ones among them.
void fill_moments(std::mt19937& random, State& state) {
  for (auto& code : state.code) code = static_cast<std::int8_t>(static_cast<int>(random() % 255) - 127);
  for (auto& code : state.code_sq) code = static_cast<std::uint8_t>(random());
  for (std::vector<float>* scales : {&state.scale, &state.scale_sq}) {
    for (float& scale : *scales) {
      const unsigned kind = random() % 10;
      scale = kind == 0   ? 0.f
              : kind == 1 ? std::ldexp(1.f, static_cast<int>(random() % 254) - 126)
              : kind == 2 ? std::vector<float>{infinity, nan, 3.4e38f}[random() % 3]
                          : 1e-3f * static_cast<float>(random() % 1000 + 1);
    }
  }
}

const std::vector<GradientType> types = {GradientType::bfloat16, GradientType::float32};

TEST(Moments8, EqualsTheReferenceToTheBitForEverySetThreadCountAndDivision) {
  ThreadPool one(1), two(2), five(5);
  int seed = 0;
  for (const bool split_planes : {true, false}) {
    for (const GradientType type : types) {
      for (AdamWHyper hyper : hypers()) {
        for (const std::size_t n : {0, 1, 15, 17, 127, 128, 129, 255, 256, 300, 512, 40001}) {
          std::mt19937 random(++seed);
          State baseline(one, split_planes, by_group(random, n));
          fill_moments(random, baseline);
          for (const std::int64_t step : {1, 2, 1000}) {
            hyper.step = step;
            const std::vector<float> gradient = by_group(random, n);
            State expected = baseline;
            expected.set_gradient(gradient);
            std::vector<float> received = gradient;
            if (type == GradientType::bfloat16) {
              std::transform(expected.gradient16.begin(), expected.gradient16.end(), received.begin(), from_bfloat16);
            }
            reference_step(one, hyper, expected, received);
            for (const std::string& set : available_instruction_sets()) {
              const ForcedSet forced(set);
              for (ThreadPool* pool : {&one, &two, &five}) {
                State state = baseline;
                state.set_gradient(gradient);
                adamw(*pool, hyper, state.planes(), state.gradient(type), type, n);
                ASSERT_TRUE(state == expected) << set << ", n " << n << ", step " << step << ", seed " << seed;
              }
              State divided = baseline;
              divided.set_gradient(gradient);
              for (std::size_t begin = 0; begin < n;) {
                const std::size_t length = std::min<std::size_t>(n - begin, group * (1 + random() % 8));
                adamw(two, hyper, divided.planes(begin), divided.gradient(type, begin), type, length);
                begin += length;
              }
              ASSERT_TRUE(divided == expected) << set << " in pieces, n " << n << ", step " << step;
            }
            baseline = expected;
          }
        }
      }
    }
  }
}

// Zeros are zero moments, so the first step's weights are those of float32 moments.
TEST(Moments8, FirstStepEqualsFloat32Moments) {
  ThreadPool pool(2);
  std::mt19937 random(5);
  const std::size_t n = 3001;
  const std::vector<float> start = normal(random, n, 0.05f), gradient = normal(random, n, 1e-3f);
  for (const AdamWHyper& hyper : hypers()) {
    State state(pool, true, start);
    state.set_gradient(gradient);
    std::vector<std::uint16_t> weight = state.weight;
    std::vector<std::int16_t> residual = state.residual;
    std::vector<float> m(n), v(n);
    adamw(pool, hyper, state.planes(), state.gradient(GradientType::bfloat16), GradientType::bfloat16, n);
    adamw(pool, hyper,
          {.weight = weight.data(), .residual = residual.data(), .exp_avg = m.data(), .exp_avg_sq = v.data()},
          state.gradient16.data(), GradientType::bfloat16, n);
    EXPECT_EQ(state.weight, weight);
    EXPECT_EQ(state.residual, residual);
  }
}

// What quantising loses, against the same update in double: half a step of the code at the value's place.
TEST(Moments8, LosesNoMoreThanHalfAStep) {
  ThreadPool pool(2);
  std::mt19937 random(6);
  const std::size_t n = 10 * group + 77;
  const AdamWHyper hyper{.lr = 1e-3};
  State state(pool, false, normal(random, n, 0.05f));
  for (int step = 1; step <= 20; ++step) {
    const State before = state;
    std::vector<float> gradient = normal(random, n, 1e-3f);
    for (std::size_t i = 0; i < n; i += 7) gradient[i] *= 1e-3f;
    state.set_gradient(gradient);
    adamw(pool, hyper, state.planes(), state.gradient32.data(), GradientType::float32, n);
    const auto moment = [](const State& s, std::size_t i) {
      const double y = s.code[i] / 127.0;
      return y / (2 - std::fabs(y)) * s.scale[i / group];
    };
    const auto root = [](const State& s, std::size_t i) { return s.code_sq[i] / 255.0 * s.scale_sq[i / group]; };
    for (std::size_t i = 0; i < n; ++i) {
      const double m = hyper.beta1 * moment(before, i) + (1 - hyper.beta1) * gradient[i];
      const double v = hyper.beta2 * std::pow(root(before, i), 2) + (1 - hyper.beta2) * gradient[i] * gradient[i];
      const double scale = state.scale[i / group], scale_sq = state.scale_sq[i / group];
      // x = y / (2 - y) has the slope 2 / (2 - y)^2 = (1 + x)^2 / 2.
      const double slope = std::pow(1 + std::fabs(m) / scale + 0.01, 2) / 2;
      ASSERT_NEAR(moment(state, i), m, scale * (0.5 / 127) * slope + 1e-6 * scale);
      if (std::sqrt(v) > 0.5 / 255 * scale_sq) {
        ASSERT_NEAR(root(state, i), std::sqrt(v), scale_sq * (0.5 / 255) + 1e-6 * scale_sq);
      } else {
        ASSERT_EQ(state.code_sq[i], v > 0 ? 1 : 0) << "what is not zero stays so: it divides";
      }
    }
  }
}

TEST(Moments8, TouchesNothingOutsideItsElements) {
  ThreadPool pool(2);
  const std::size_t room = 1024, offset = 256;
  for (const std::string& set : available_instruction_sets()) {
    const ForcedSet forced(set);
    for (const bool split_planes : {true, false}) {
      for (const std::size_t n : {0, 1, 31, 127, 128, 130, 384, 500}) {
        State state(pool, split_planes, std::vector<float>(room, 0.5f));
        state.set_gradient(std::vector<float>(room, 1.f));
        const State before = state;
        adamw(pool, {}, state.planes(offset), state.gradient(GradientType::float32, offset), GradientType::float32, n);
        const std::vector<float> was = before.master(pool), is = state.master(pool);
        for (std::size_t i = 0; i < room; ++i) {
          const bool inside = i >= offset && i < offset + n;
          ASSERT_EQ(was[i] != is[i], inside) << i;
          ASSERT_EQ(state.code[i] != 0, inside) << i;
          ASSERT_EQ(state.code_sq[i] != 0, inside) << i;
          const bool group_inside = i / group * group >= offset && i / group * group < offset + n;
          ASSERT_EQ(state.scale[i / group] != 0, group_inside) << i;
          ASSERT_EQ(state.scale_sq[i / group] != 0, group_inside) << i;
        }
      }
    }
  }
}

TEST(Moments8, WhatIsNotFiniteStaysInItsGroup) {
  ThreadPool pool(1);
  for (const std::string& set : available_instruction_sets()) {
    const ForcedSet forced(set);
    State state(pool, true, std::vector<float>(6 * group, 1.f));
    std::vector<float> gradient(6 * group, 1e-3f);
    gradient[1 * group + 5] = nan;
    gradient[2 * group + 5] = infinity;
    gradient[3 * group + 5] = 1e30f;  // its square overflows
    for (std::size_t i = 4 * group; i < 5 * group; ++i) gradient[i] = 1e-39f;
    state.set_gradient(gradient);
    for (AdamWHyper hyper{.lr = 1e-3}; hyper.step <= 2; ++hyper.step) {
      adamw(pool, hyper, state.planes(), state.gradient(GradientType::float32), GradientType::float32, 6 * group);
      const std::vector<float> master = state.master(pool);
      for (const std::size_t good : {0, 4, 5}) {
        for (std::size_t i = good * group; i < (good + 1) * group; ++i) ASSERT_TRUE(std::isfinite(master[i])) << i;
        ASSERT_TRUE(std::isfinite(state.scale[good])) << good;
      }
      EXPECT_TRUE(std::isnan(state.scale[1]));
      EXPECT_TRUE(std::isnan(state.scale_sq[1]));
      for (const std::size_t overflown : {2, 3}) {  // its code is 0, and 0 times infinity no number
        EXPECT_EQ(std::isnan(state.scale_sq[overflown]), hyper.step > 1);
        EXPECT_EQ(std::isinf(state.scale_sq[overflown]), hyper.step == 1);
      }
      EXPECT_TRUE(std::isnan(master[1 * group + 5]));
      EXPECT_EQ(std::isnan(master[1 * group + 4]), hyper.step > 1) << "its neighbours learn of it by the scale";
      EXPECT_EQ(state.scale[4], 0.f) << "below the smallest normal number a scale has no reciprocal";
      EXPECT_EQ(state.scale_sq[4], 0.f);
    }
  }
}

TEST(Moments8, IgnoresTheCallersFloatEnvironment) {
  ThreadPool pool(2);
  const std::size_t n = 50000;
  std::mt19937 random(3);
  State expected(pool, true, normal(random, n, 1.f));
  expected.set_gradient(normal(random, n, 1e-20f));
  State rounded = expected;
  for (std::int64_t step = 1; step <= 2; ++step) {
    adamw(pool, {.step = step}, expected.planes(), expected.gradient32.data(), GradientType::float32, n);
  }
  ASSERT_EQ(std::fesetround(FE_UPWARD), 0);
  for (std::int64_t step = 1; step <= 2; ++step) {
    adamw(pool, {.step = step}, rounded.planes(), rounded.gradient32.data(), GradientType::float32, n);
  }
  std::fesetround(FE_TONEAREST);
  EXPECT_TRUE(expected == rounded);
}

Code code_of(const AdamWPlanes& planes) {
  ThreadPool pool(1);
  const std::vector<float> gradient(8);
  try {
    adamw(pool, {}, planes, gradient.data(), GradientType::float32, 8);
  } catch (const Error& error) {
    return error.code();
  }
  return Code::io;  // nothing was thrown
}

TEST(Moments8, RefusesPlanesThatAreMissingMixedOrMisaligned) {
  ThreadPool pool(1);
  State state(pool, false, std::vector<float>(8));
  std::vector<float> m(8), v(8);
  const AdamWPlanes good = state.planes();
  EXPECT_EQ(code_of(good), Code::io);
  const auto refused = [&](const auto& change) {
    AdamWPlanes planes = good;
    change(planes);
    EXPECT_EQ(code_of(planes), Code::invalid_argument);
  };
  refused([](AdamWPlanes& p) { p.exp_avg8 = nullptr; });
  refused([](AdamWPlanes& p) { p.exp_avg_sq8 = nullptr; });
  refused([](AdamWPlanes& p) { p.exp_avg_scale = nullptr; });
  refused([](AdamWPlanes& p) { p.exp_avg_sq_scale = nullptr; });
  refused([&](AdamWPlanes& p) { p.exp_avg = m.data(); });
  refused([&](AdamWPlanes& p) { p.exp_avg = m.data(), p.exp_avg_sq = v.data(); });
  refused([](AdamWPlanes& p) { p.exp_avg_scale = reinterpret_cast<float*>(p.exp_avg8 + 1); });
}

struct Sink {
  explicit Sink(const std::shared_ptr<ThreadPool>& pool, State& state) : sink(pool) {
    sink.add_chunk(state.planes(), state.code.size(), GradientType::bfloat16);
  }
  void submit(const State& state, std::size_t piece) {
    sink.begin(0);
    for (std::size_t i = 0; i < state.gradient16.size(); i += piece) {
      sink.consume(0, i * 2, state.gradient16.data() + i, std::min(piece, state.gradient16.size() - i) * 2);
    }
    sink.end(0);
  }
  AdamWSink sink;
};

TEST(Moments8, SegmentsAndPiecesOfTheSinkEqualDirectUpdates) {
  auto pool = std::make_shared<ThreadPool>(3);
  const std::size_t n = 100003;
  const AdamWHyper a{.lr = 1e-3, .weight_decay = 0.1}, b{.lr = 1e-2, .weight_decay = 0, .step = 7};
  // Entries as the planes hold them: at multiples of a group, of any length; gaps are frozen or skipped entries.
  const std::vector<AdamWSink::Segment> segments = {{0, 130, a},      {256, 128, a},    {384, 128, b}, {512, 1, b},
                                                    {1024, 50003, a}, {51072, 4096, b}, {99968, 35, a}};
  std::mt19937 random(8);
  State start(*pool, true, normal(random, n, 0.05f));
  start.set_gradient(normal(random, n, 1e-3f));
  State expected = start;
  for (const AdamWSink::Segment& s : segments) {
    adamw(*pool, s.hyper, expected.planes(s.offset), expected.gradient16.data() + s.offset, GradientType::bfloat16,
          s.length);
  }
  for (const std::size_t piece : {2048, 4096, 32768, 200064}) {
    State state = start;
    Sink sink(pool, state);
    sink.sink.prepare(0, segments);
    sink.submit(state, piece);
    EXPECT_TRUE(state == expected) << piece;
  }
}

TEST(Moments8, TheSinkRefusesToCutAGroup) {
  auto pool = std::make_shared<ThreadPool>(1);
  const std::size_t n = 1000;
  State state(*pool, true, std::vector<float>(n, 1.f));
  state.set_gradient(std::vector<float>(n, 1.f));
  const State before = state;
  Sink sink(pool, state);
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::invalid_argument);
      return error.what();
    }
    return "nothing was thrown";
  };
  const std::string segment = message([&] { sink.sink.prepare(0, {{0, 64, {}}, {64, 64, {}}}); });
  EXPECT_NE(segment.find("segment 1"), std::string::npos) << segment;
  EXPECT_NE(segment.find("128"), std::string::npos) << segment;
  sink.sink.prepare(0, {{0, n, {}}});
  sink.sink.begin(0);
  for (const auto& [first, count] : std::vector<std::pair<std::size_t, std::size_t>>{{0, 100}, {64, 64}, {896, 100}}) {
    const std::string piece =
        message([&, f = first, c = count] { sink.sink.consume(0, f * 2, state.gradient16.data(), c * 2); });
    EXPECT_NE(piece.find("4096"), std::string::npos) << piece;
  }
  EXPECT_TRUE(state == before);
  sink.sink.consume(0, 0, state.gradient16.data(), 896 * 2);
  sink.sink.consume(0, 896 * 2, state.gradient16.data() + 896, 104 * 2);  // the last group may be partial
  sink.sink.end(0);
  EXPECT_FALSE(state == before);
}

}  // namespace
}  // namespace slidecore
