#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "optimizer_support.h"
#include "slidecore/optimizer.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

// A chunk's planes in one of the four forms, and its gradient.
struct State {
  bool split_planes;
  GradientType type;
  std::vector<std::uint16_t> weight;
  std::vector<std::int16_t> residual;
  std::vector<float> weight32, exp_avg, exp_avg_sq, gradient32;
  std::vector<std::uint16_t> gradient16;

  State(ThreadPool& pool, bool split_form, GradientType gradient_type, const std::vector<float>& master)
      : split_planes(split_form), type(gradient_type), exp_avg(master.size()), exp_avg_sq(master.size()) {
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
    result.exp_avg = exp_avg.data() + offset;
    result.exp_avg_sq = exp_avg_sq.data() + offset;
    return result;
  }

  void set_gradient(const std::vector<float>& gradient) {
    gradient32 = gradient;
    gradient16.resize(gradient.size());
    std::transform(gradient.begin(), gradient.end(), gradient16.begin(), to_bfloat16);
  }
  const void* gradient(std::size_t offset = 0) const {
    if (type == GradientType::bfloat16) return gradient16.data() + offset;
    return gradient32.data() + offset;
  }
  float gradient_at(std::size_t i) const {
    return type == GradientType::bfloat16 ? from_bfloat16(gradient16[i]) : gradient32[i];
  }

  std::vector<float> master(ThreadPool& pool) const {
    if (!split_planes) return weight32;
    std::vector<float> result(weight.size());
    merge(pool, weight.data(), residual.data(), result.data(), result.size());
    return result;
  }
};

bool operator==(const State& a, const State& b) {
  return a.weight == b.weight && a.residual == b.residual && same_bits(a.weight32, b.weight32) &&
         same_bits(a.exp_avg, b.exp_avg) && same_bits(a.exp_avg_sq, b.exp_avg_sq);
}

struct Double {
  double p, m = 0, v = 0;
};

void reference_step(const AdamWHyper& h, Double& x, double g) {
  g *= h.maximize ? -double{h.gradient_scale} : double{h.gradient_scale};
  x.p *= 1 - h.lr * h.weight_decay;
  x.m = h.beta1 * x.m + (1 - h.beta1) * g;
  x.v = h.beta2 * x.v + (1 - h.beta2) * g * g;
  const double step = static_cast<double>(h.step);
  const double m_hat = x.m / (1 - std::pow(h.beta1, step));
  const double v_hat = x.v / (1 - std::pow(h.beta2, step));
  x.p -= h.lr * m_hat / (std::sqrt(v_hat) + h.eps);
}

struct Form {
  bool split_planes;
  GradientType type;
};
const std::vector<Form> forms = {{true, GradientType::bfloat16},
                                 {true, GradientType::float32},
                                 {false, GradientType::bfloat16},
                                 {false, GradientType::float32}};

TEST(AdamW, StaysCloseToDoublePrecision) {
  ThreadPool pool(2);
  for (const std::string& set : available_instruction_sets()) {
    const ForcedSet forced(set);
    for (const Form& form : forms) {
      int seed = 0;
      for (AdamWHyper hyper : hypers()) {
        std::mt19937 random(++seed);
        const std::size_t n = 203;
        const std::vector<float> start = normal(random, n, 0.05f);
        State state(pool, form.split_planes, form.type, start);
        std::vector<Double> reference(n);
        for (std::size_t i = 0; i < n; ++i) reference[i].p = start[i];
        for (hyper.step = 1; hyper.step <= 1000; ++hyper.step) {
          state.set_gradient(normal(random, n, 1e-3f));
          adamw(pool, hyper, state.planes(), state.gradient(), form.type, n);
          for (std::size_t i = 0; i < n; ++i) reference_step(hyper, reference[i], state.gradient_at(i));
          if (hyper.step > 3 && hyper.step != 10 && hyper.step != 100 && hyper.step != 1000) continue;
          const std::vector<float> master = state.master(pool);
          const double steps = static_cast<double>(hyper.step);
          for (std::size_t i = 0; i < n; ++i) {
            // A rounding of p and a relative error of some 1e-6 in the step itself, each time. The update is at
            // most about lr / sqrt(1 - beta2) large.
            const double per_step = 6e-8 * (std::fabs(reference[i].p) + 0.05) + 2e-6 * hyper.lr;
            ASSERT_NEAR(master[i], reference[i].p, 1e-9 + steps * per_step) << set << " step " << hyper.step;
            ASSERT_NEAR(state.exp_avg[i], reference[i].m, 1e-8);
            ASSERT_NEAR(state.exp_avg_sq[i], reference[i].v, 1e-5 * reference[i].v + 1e-20);
          }
        }
      }
    }
  }
}

// The order of operations itself, one float operation at a time.
void scalar_step(const AdamWHyper& h, float& p, float& m, float& v, float g) {
  const double step = static_cast<double>(h.step);
  const volatile float scaled = g * h.gradient_scale;
  g = h.maximize ? -scaled : scaled;
  const volatile double decay = h.lr * h.weight_decay;
  const volatile float decayed = p * static_cast<float>(1 - decay);
  const auto weight = static_cast<float>(1 - h.beta1);
  const volatile float difference = g - m;
  const volatile float product = weight < 0.5f ? weight * difference : difference * (1.f - weight);
  m = weight < 0.5f ? m + product : g - product;
  const volatile float kept = v * static_cast<float>(h.beta2);
  const volatile float first = static_cast<float>(1 - h.beta2) * g;
  const volatile float second = first * g;
  v = kept + second;
  const volatile float root = std::sqrt(v);
  const volatile float divided = root / static_cast<float>(std::sqrt(1 - std::pow(h.beta2, step)));
  const volatile float denominator = divided + static_cast<float>(h.eps);
  const volatile float numerator = static_cast<float>(-(h.lr / (1 - std::pow(h.beta1, step)))) * m;
  const volatile float update = numerator / denominator;
  p = decayed + update;
}

TEST(AdamW, FollowsTheOrderOfOperationsToTheBit) {
  ThreadPool pool(1);
  const std::size_t n = 1003;
  int seed = 100;
  for (AdamWHyper hyper : hypers()) {
    std::mt19937 random(++seed);
    const std::vector<float> start = normal(random, n, 0.05f);
    std::vector<float> p = start, m(n), v(n);
    State state(pool, true, GradientType::float32, start);
    for (hyper.step = 1; hyper.step <= 50; ++hyper.step) {
      state.set_gradient(normal(random, n, std::pow(10.f, static_cast<float>(hyper.step % 9) - 6.f)));
      adamw(pool, hyper, state.planes(), state.gradient(), state.type, n);
      for (std::size_t i = 0; i < n; ++i) scalar_step(hyper, p[i], m[i], v[i], state.gradient32[i]);
      ASSERT_TRUE(same_bits(state.master(pool), p)) << hyper.step;
      ASSERT_TRUE(same_bits(state.exp_avg, m)) << hyper.step;
      ASSERT_TRUE(same_bits(state.exp_avg_sq, v)) << hyper.step;
    }
  }
}

TEST(AdamW, IsBitIdenticalForEverySetThreadCountAndDivision) {
  ThreadPool one(1), two(2), five(5);
  for (const Form& form : forms) {
    int seed = 1;
    for (AdamWHyper hyper : hypers()) {
      for (const std::size_t n : {0, 1, 15, 16, 17, 63, 65, 4095, 40001}) {
        std::mt19937 random(++seed);
        State baseline(one, form.split_planes, form.type, wild(random, n));
        baseline.exp_avg = wild(random, n);
        baseline.exp_avg_sq = wild(random, n);
        std::vector<State> others;
        for (int steps = 0; steps < 2; ++steps) {
          hyper.step = 1 + steps * 999;
          const std::vector<float> gradient = wild(random, n);
          std::vector<State> results;
          for (const std::string& set : available_instruction_sets()) {
            const ForcedSet forced(set);
            for (ThreadPool* pool : {&one, &two, &five}) {
              results.push_back(baseline);
              State& state = results.back();
              state.set_gradient(gradient);
              adamw(*pool, hyper, state.planes(), state.gradient(), form.type, n);
            }
            results.push_back(baseline);
            State& divided = results.back();
            divided.set_gradient(gradient);
            for (std::size_t begin = 0; begin < n;) {
              const std::size_t length = std::min<std::size_t>(n - begin, 1 + random() % 1000);
              adamw(two, hyper, divided.planes(begin), divided.gradient(begin), form.type, length);
              begin += length;
            }
          }
          for (std::size_t i = 1; i < results.size(); ++i) {
            ASSERT_TRUE(results[0] == results[i]) << "n " << n << ", result " << i;
          }
          baseline = results[0];
        }
      }
    }
  }
}

TEST(AdamW, GradientTypesAndPlaneFormsAgree) {
  ThreadPool pool(2);
  const std::size_t n = 5001;
  std::mt19937 random(7);
  const std::vector<float> start = normal(random, n, 1.f);
  std::vector<State> states;
  for (const Form& form : forms) states.emplace_back(pool, form.split_planes, form.type, start);
  for (AdamWHyper hyper{.lr = 1e-2}; hyper.step <= 20; ++hyper.step) {
    std::vector<float> gradient = normal(random, n, 1e-2f);
    for (float& g : gradient) g = from_bfloat16(to_bfloat16(g));
    for (State& state : states) {
      state.set_gradient(gradient);
      adamw(pool, hyper, state.planes(), state.gradient(), state.type, n);
    }
  }
  for (const State& state : states) {
    EXPECT_TRUE(same_bits(state.master(pool), states[0].master(pool)));
    EXPECT_TRUE(same_bits(state.exp_avg, states[0].exp_avg));
    EXPECT_TRUE(same_bits(state.exp_avg_sq, states[0].exp_avg_sq));
  }
}

TEST(AdamW, TouchesNothingOutsideItsElements) {
  ThreadPool pool(2);
  const std::size_t room = 5000;
  for (const std::string& set : available_instruction_sets()) {
    const ForcedSet forced(set);
    for (const Form& form : forms) {
      for (const std::size_t n : {0, 1, 15, 17, 31, 32, 4095}) {
        for (const std::size_t offset : {1, 5, 13}) {
          State state(pool, form.split_planes, form.type, std::vector<float>(room, 0.5f));
          state.set_gradient(std::vector<float>(room, 1.f));
          const State before = state;
          adamw(pool, {}, state.planes(offset), state.gradient(offset), form.type, n);
          const std::vector<float> was = before.master(pool), is = state.master(pool);
          for (std::size_t i = 0; i < room; ++i) {
            const bool inside = i >= offset && i < offset + n;
            ASSERT_EQ(was[i] != is[i], inside) << i;
            ASSERT_EQ(state.exp_avg[i] != 0, inside) << i;
            ASSERT_EQ(state.exp_avg_sq[i] != 0, inside) << i;
          }
        }
      }
    }
  }
}

TEST(AdamW, ExtremeGradients) {
  ThreadPool pool(1);
  for (const std::string& set : available_instruction_sets()) {
    const ForcedSet forced(set);
    State state(pool, true, GradientType::float32, std::vector<float>(40, 1.f));
    std::vector<float> gradient(40, 0.f);
    gradient[1] = infinity;
    gradient[2] = nan;
    gradient[3] = 1e30f;   // its square overflows: the update vanishes, as in torch
    gradient[4] = 1e-42f;  // a denormal: its square underflows, eps carries the update
    gradient[5] = std::bit_cast<float>(0x7fffffffu);
    state.set_gradient(gradient);
    const AdamWHyper hyper{.lr = 1e-3, .weight_decay = 0};
    adamw(pool, hyper, state.planes(), state.gradient(), state.type, 40);
    const std::vector<float> master = state.master(pool);
    EXPECT_EQ(master[0], 1.f);
    EXPECT_EQ(state.exp_avg[0], 0.f);
    EXPECT_TRUE(std::isnan(master[1]));
    EXPECT_EQ(state.exp_avg[1], infinity);
    EXPECT_TRUE(std::isnan(master[2]));
    EXPECT_EQ(state.exp_avg_sq[3], infinity);
    EXPECT_EQ(master[3], 1.f);
    EXPECT_GT(state.exp_avg[4], 0.f) << "denormals are kept";
    EXPECT_EQ(state.exp_avg_sq[4], 0.f);
    EXPECT_TRUE(std::isnan(master[5]));
    for (const std::size_t bad : {1, 2, 5}) {
      EXPECT_TRUE(std::isnan(from_bfloat16(state.weight[bad]))) << "the half that the device sees is a NaN, too";
    }
  }
}

// The register that says how floats are computed, and its bits that flush denormal results and operands to zero.
#if defined(__x86_64__)
constexpr std::uint64_t flushing = 0x8040;
std::uint64_t float_control() {
  return __builtin_ia32_stmxcsr();
}
void set_float_control(std::uint64_t value) {
  __builtin_ia32_ldmxcsr(static_cast<unsigned>(value));
}
#elif defined(__aarch64__)
constexpr std::uint64_t flushing = std::uint64_t{1} << 24;
std::uint64_t float_control() {
  std::uint64_t value = 0;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_float_control(std::uint64_t value) {
  asm volatile("msr fpcr, %0" : : "r"(value));
}
#endif

TEST(AdamW, IgnoresTheCallersFloatEnvironment) {
  ThreadPool pool(2);
  const std::size_t n = 50000;
  std::mt19937 random(3);
  const std::vector<float> start = normal(random, n, 1.f), gradient = normal(random, n, 1e-20f);
  State expected(pool, true, GradientType::float32, start);
  State rounded = expected;
  expected.set_gradient(gradient);
  rounded.set_gradient(gradient);
  adamw(pool, {}, expected.planes(), expected.gradient(), expected.type, n);
  ASSERT_EQ(std::fesetround(FE_UPWARD), 0);
  adamw(pool, {}, rounded.planes(), rounded.gradient(), rounded.type, n);
  EXPECT_EQ(std::fegetround(), FE_UPWARD);
  std::fesetround(FE_TONEAREST);
  EXPECT_TRUE(expected == rounded);
#if defined(__x86_64__) || defined(__aarch64__)
  const std::uint64_t before = float_control();
  set_float_control(before | flushing);
  State flushed(pool, true, GradientType::float32, start);
  flushed.set_gradient(gradient);
  adamw(pool, {}, flushed.planes(), flushed.gradient(), flushed.type, n);
  EXPECT_EQ(float_control() & flushing, flushing);
  set_float_control(before);
  EXPECT_TRUE(expected == flushed);
#endif
}

TEST(AdamW, RefusesWhatItCannotDo) {
  ThreadPool pool(1);
  std::vector<float> f(8), m(8), v(8), g(8);
  std::vector<std::uint16_t> w(8);
  std::vector<std::int16_t> r(8);
  const AdamWPlanes good{nullptr, nullptr, f.data(), m.data(), v.data()};
  const auto code = [&](const AdamWHyper& hyper, const AdamWPlanes& planes, const void* gradient) {
    try {
      adamw(pool, hyper, planes, gradient, GradientType::float32, 8);
    } catch (const Error& error) {
      return error.code();
    }
    return Code::io;
  };
  const Code refused = Code::invalid_argument, accepted = Code::io;
  EXPECT_EQ(code({}, good, g.data()), accepted);
  EXPECT_EQ(code({}, good, nullptr), refused);
  EXPECT_EQ(code({}, good, reinterpret_cast<const char*>(g.data()) + 2), refused);
  EXPECT_EQ(code({}, {w.data(), r.data(), nullptr, m.data(), v.data()}, g.data()), accepted);
  EXPECT_EQ(code({}, {w.data(), nullptr, nullptr, m.data(), v.data()}, g.data()), refused);
  EXPECT_EQ(code({}, {w.data(), r.data(), f.data(), m.data(), v.data()}, g.data()), refused);
  EXPECT_EQ(code({}, {w.data(), r.data(), nullptr, nullptr, v.data()}, g.data()), refused);
  EXPECT_EQ(code({}, {}, g.data()), refused);
  EXPECT_EQ(code({.lr = -1}, good, g.data()), refused);
  EXPECT_EQ(code({.lr = double{nan}}, good, g.data()), refused);
  EXPECT_EQ(code({.beta1 = 1}, good, g.data()), refused);
  EXPECT_EQ(code({.beta2 = -0.1}, good, g.data()), refused);
  EXPECT_EQ(code({.eps = -1e-8}, good, g.data()), refused);
  EXPECT_EQ(code({.weight_decay = -1}, good, g.data()), refused);
  EXPECT_EQ(code({.step = 0}, good, g.data()), refused);
  EXPECT_NO_THROW(adamw(pool, {}, {}, nullptr, GradientType::bfloat16, 0));
}

TEST(InstructionSet, CanBeForced) {
  const std::vector<std::string> sets = available_instruction_sets();
  ASSERT_FALSE(sets.empty());
  EXPECT_EQ(sets.front(), "generic");
  if (std::getenv("SLIDECORE_ISA") == nullptr) {
    EXPECT_EQ(instruction_set(), sets.back());
  }
  for (const std::string& set : sets) {
    const ForcedSet forced(set);
    EXPECT_EQ(instruction_set(), set);
  }
  try {
    force_instruction_set("sse9");
    ADD_FAILURE() << "sse9 was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::invalid_argument);
    EXPECT_NE(std::string(error.what()).find("generic"), std::string::npos) << "names what there is";
  }
}

TEST(InstructionSetDeathTest, IsReadFromTheEnvironmentAtFirstUse) {
  ::testing::GTEST_FLAG(death_test_style) = "threadsafe";  // a fresh process, in which nothing was chosen yet
  EXPECT_EXIT(
      {
        ::setenv("SLIDECORE_ISA", "generic", 1);
        std::_Exit(std::string(instruction_set()) == "generic" ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "");
  EXPECT_EXIT(
      {
        ::setenv("SLIDECORE_ISA", "sse9", 1);
        int thrown = 0;
        for (int i = 0; i < 2; ++i) {
          try {
            instruction_set();
          } catch (const Error& error) {
            thrown += error.code() == Code::invalid_argument;
          }
        }
        std::_Exit(thrown == 2 ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace slidecore
