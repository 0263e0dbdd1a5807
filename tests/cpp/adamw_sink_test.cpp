#include "slidecore/adamw_sink.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "slidecore/optimizer.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

using Segment = AdamWSink::Segment;

struct Planes {
  std::vector<std::uint16_t> weight;
  std::vector<std::int16_t> residual;
  std::vector<float> exp_avg, exp_avg_sq;

  explicit Planes(std::size_t n) : weight(n), residual(n), exp_avg(n), exp_avg_sq(n) {
    for (std::size_t i = 0; i < n; ++i) {
      weight[i] = static_cast<std::uint16_t>(0x3c00 + i % 777);
      residual[i] = static_cast<std::int16_t>(i * 31);
    }
  }
  AdamWPlanes at(std::size_t offset) {
    return {weight.data() + offset, residual.data() + offset, nullptr, exp_avg.data() + offset,
            exp_avg_sq.data() + offset};
  }
  bool operator==(const Planes& other) const = default;
};

std::vector<std::uint16_t> gradient_of(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::uint16_t> gradient(n);
  for (auto& g : gradient) g = static_cast<std::uint16_t>(0x3a00 + random() % 512 + (random() % 2) * 0x8000);
  return gradient;
}

void submit(GradientSink& sink, std::uint32_t chunk, const std::vector<std::uint16_t>& gradient,
            std::size_t piece_elements) {
  sink.begin(chunk);
  for (std::size_t i = 0; i < gradient.size(); i += piece_elements) {
    const std::size_t count = std::min(piece_elements, gradient.size() - i);
    sink.consume(chunk, i * 2, gradient.data() + i, count * 2);
  }
  sink.end(chunk);
}

template <typename Call>
std::string message_of(Code code, const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(AdamWSink, SegmentsAndPiecesEqualDirectUpdates) {
  auto pool = std::make_shared<ThreadPool>(3);
  const std::size_t n = 100003;
  const AdamWHyper a{.lr = 1e-3, .weight_decay = 0.1}, b{.lr = 1e-2, .weight_decay = 0, .step = 7};
  // Gaps, neighbours with equal and with different values, an empty one, and ends inside a block.
  const std::vector<Segment> segments = {{1, 10, a},    {11, 4, b},    {15, 5, b},        {20, 0, a},    {30, 40000, a},
                                         {40030, 1, b}, {50000, 3, a}, {50003, 30000, b}, {100002, 1, a}};
  const std::vector<std::uint16_t> gradient = gradient_of(n, 1);
  Planes expected(n);
  for (const Segment& s : segments) {
    adamw(*pool, s.hyper, expected.at(s.offset), gradient.data() + s.offset, GradientType::bfloat16, s.length);
  }
  const Planes start(n);
  for (const std::size_t gap : {0, 20, 29, 49999, 80003, 100001}) ASSERT_EQ(expected.weight[gap], start.weight[gap]);
  for (const std::size_t piece : {1024, 4096, 33333, 200000}) {
    Planes planes(n);
    AdamWSink sink(pool);
    ASSERT_EQ(sink.add_chunk(planes.at(0), n, GradientType::bfloat16), 0u);
    sink.prepare(0, segments);
    submit(sink, 0, gradient, piece);
    EXPECT_TRUE(planes == expected) << piece;
  }
}

TEST(AdamWSink, Float32GradientAndWholeWeights) {
  auto pool = std::make_shared<ThreadPool>(2);
  const std::size_t n = 5000;
  std::vector<float> weight(n, 1.f), m(n), v(n), gradient(n, 0.25f);
  std::vector<float> weight2 = weight, m2 = m, v2 = v;
  AdamWSink sink(pool);
  sink.add_chunk({nullptr, nullptr, weight.data(), m.data(), v.data()}, n, GradientType::float32);
  sink.prepare(0, {{0, n, {}}});
  sink.begin(0);
  sink.consume(0, 0, gradient.data(), 4096);
  sink.consume(0, 4096, gradient.data() + 1024, (n - 1024) * 4);
  sink.end(0);
  adamw(*pool, {}, {nullptr, nullptr, weight2.data(), m2.data(), v2.data()}, gradient.data(), GradientType::float32, n);
  EXPECT_EQ(weight, weight2);
  EXPECT_EQ(m, m2);
  EXPECT_EQ(v, v2);
}

TEST(AdamWSink, NoSegmentsLeaveTheChunkAsItIs) {
  Planes planes(1000);
  AdamWSink sink(std::make_shared<ThreadPool>(1));
  sink.add_chunk(planes.at(0), 1000, GradientType::bfloat16);
  sink.prepare(0, {});
  submit(sink, 0, gradient_of(1000, 2), 512);
  EXPECT_TRUE(planes == Planes(1000));
}

TEST(AdamWSink, TablesAreTakenInTheOrderTheyWerePrepared) {
  auto pool = std::make_shared<ThreadPool>(1);
  const std::size_t n = 3000;
  Planes planes(n), expected(n);
  AdamWSink sink(pool);
  sink.add_chunk(planes.at(0), n, GradientType::bfloat16);
  for (std::int64_t step = 1; step <= 3; ++step) sink.prepare(0, {{0, n, {.lr = 1e-2, .step = step}}});
  for (std::int64_t step = 1; step <= 3; ++step) {
    const auto gradient = gradient_of(n, static_cast<unsigned>(step));
    submit(sink, 0, gradient, 1000);
    adamw(*pool, {.lr = 1e-2, .step = step}, expected.at(0), gradient.data(), GradientType::bfloat16, n);
    EXPECT_TRUE(planes == expected);
  }
  EXPECT_TRUE(contains(message_of(Code::state, [&] { sink.begin(0); }), "chunk 0"));
}

TEST(AdamWSink, WithdrawDropsWhatWasPreparedLast) {
  auto pool = std::make_shared<ThreadPool>(1);
  Planes planes(100), expected(100);
  AdamWSink sink(pool);
  sink.add_chunk(planes.at(0), 100, GradientType::bfloat16);
  sink.withdraw(0);  // of nothing
  sink.prepare(0, {{0, 100, {.lr = 0.5}}});
  sink.prepare(0, {{0, 100, {.lr = 0.25}}});
  sink.withdraw(0);
  const auto gradient = gradient_of(100, 4);
  submit(sink, 0, gradient, 100);
  adamw(*pool, {.lr = 0.5}, expected.at(0), gradient.data(), GradientType::bfloat16, 100);
  EXPECT_TRUE(planes == expected);
  message_of(Code::state, [&] { sink.begin(0); });
}

TEST(AdamWSink, DiscardDropsWhatWasNotBegun) {
  auto pool = std::make_shared<ThreadPool>(1);
  Planes planes(100), expected(100);
  AdamWSink sink(pool);
  sink.add_chunk(planes.at(0), 100, GradientType::bfloat16);
  sink.prepare(0, {{0, 100, {.lr = 0.5}}});
  sink.prepare(0, {{0, 100, {.lr = 0.25}}});
  const auto gradient = gradient_of(100, 4);
  sink.begin(0);
  sink.discard(0);  // the begun one goes on
  sink.consume(0, 0, gradient.data(), 200);
  sink.end(0);
  adamw(*pool, {.lr = 0.5}, expected.at(0), gradient.data(), GradientType::bfloat16, 100);
  EXPECT_TRUE(planes == expected);
  message_of(Code::state, [&] { sink.begin(0); });
  sink.prepare(0, {});
  sink.begin(0);
  sink.consume(0, 0, gradient.data(), 200);
  sink.end(0);
  EXPECT_TRUE(planes == expected);
}

TEST(AdamWSink, PrepareRefusesBadSegmentsAndChangesNothing) {
  Planes planes(100);
  AdamWSink sink(std::make_shared<ThreadPool>(1));
  sink.add_chunk(planes.at(0), 100, GradientType::bfloat16);
  const auto refused = [&](const std::vector<Segment>& segments) {
    return message_of(Code::invalid_argument, [&] { sink.prepare(0, segments); });
  };
  EXPECT_TRUE(contains(refused({{0, 101, {}}}), "chunk 0, segment 0"));
  refused({{101, 0, {}}});
  refused({{50, static_cast<std::size_t>(-1), {}}});
  EXPECT_TRUE(contains(refused({{0, 10, {}}, {9, 10, {}}}), "segment 1"));
  refused({{10, 10, {}}, {0, 10, {}}});
  EXPECT_TRUE(contains(refused({{0, 10, {}}, {10, 10, {.lr = -1}}}), "lr"));
  message_of(Code::invalid_argument, [&] { sink.prepare(1, {}); });
  message_of(Code::state, [&] { sink.begin(0); });
}

TEST(AdamWSink, RefusesCallsOutOfOrderAndPiecesThatDoNotFit) {
  EXPECT_THROW(AdamWSink(nullptr), Error);
  Planes planes(100);
  AdamWSink sink(std::make_shared<ThreadPool>(1));
  EXPECT_THROW(sink.add_chunk({}, 100, GradientType::bfloat16), Error);
  sink.add_chunk(planes.at(0), 100, GradientType::bfloat16);
  const auto gradient = gradient_of(101, 5);
  message_of(Code::state, [&] { sink.consume(0, 0, gradient.data(), 200); });
  message_of(Code::state, [&] { sink.end(0); });
  sink.prepare(0, {{0, 100, {}}});
  sink.prepare(0, {{0, 100, {}}});
  sink.begin(0);
  message_of(Code::state, [&] { sink.begin(0); });
  message_of(Code::invalid_argument, [&] { sink.consume(0, 0, gradient.data(), 202); });
  message_of(Code::invalid_argument, [&] { sink.consume(0, 200, gradient.data(), 2); });
  message_of(Code::invalid_argument, [&] { sink.consume(0, 1, gradient.data(), 2); });
  message_of(Code::invalid_argument, [&] { sink.consume(0, 0, gradient.data(), 3); });
  message_of(Code::invalid_argument, [&] { sink.consume(0, 0, nullptr, 2); });
  message_of(Code::invalid_argument, [&] { sink.consume(7, 0, gradient.data(), 2); });
  message_of(Code::invalid_argument, [&] { sink.consume(0, 100, gradient.data(), 100); });  // the first half is missing
  EXPECT_TRUE(planes == Planes(100));
  sink.consume(0, 0, gradient.data(), 100);
  EXPECT_NE(message_of(Code::invalid_argument, [&] { sink.end(0); }).find("100 bytes of a gradient of 200"),
            std::string::npos);
  sink.consume(0, 100, gradient.data() + 50, 100);
  sink.end(0);
}

using SumSegment = AdamWSink::SumSegment;

float wide(std::uint16_t bfloat16) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename Element>
void submit_pieces(GradientSink& sink, const std::vector<Element>& gradient, std::size_t piece_elements) {
  sink.begin(0);
  for (std::size_t i = 0; i < gradient.size(); i += piece_elements) {
    const std::size_t count = std::min(piece_elements, gradient.size() - i);
    sink.consume(0, i * sizeof(Element), gradient.data() + i, count * sizeof(Element));
  }
  sink.end(0);
}

// What two submissions to a sum leave: the first of all segments, the second added to some and new in others.
struct Sums {
  std::vector<float> sum;
  std::vector<double> squares;
};

constexpr std::size_t kSumElements = 70'001;
// Gaps, neighbours, an empty one, and ends inside a block of 16384.
const std::vector<SumSegment> kFirst = {
    {3, 20'000, true}, {20'003, 1, true}, {20'010, 0, true}, {30'000, 40'001, true}};
const std::vector<SumSegment> kSecond = {
    {3, 20'000, false}, {20'003, 1, true}, {25'000, 100, true}, {32'768, 20'000, false}};

template <typename Element>
Sums add_up(int threads, std::size_t piece_elements, const std::vector<std::vector<Element>>& gradients) {
  const GradientType type = sizeof(Element) == 2 ? GradientType::bfloat16 : GradientType::float32;
  Planes planes(kSumElements);
  AdamWSink sink(std::make_shared<ThreadPool>(threads));
  sink.add_chunk(planes.at(0), kSumElements, type);
  Sums out{std::vector<float>(kSumElements, -7.f), {}};
  sink.prepare_sum(0, kFirst, out.sum.data(), type);
  sink.prepare_sum(0, kSecond, out.sum.data(), type);
  submit_pieces(sink, gradients[0], piece_elements);
  EXPECT_EQ(sink.squares(0).size(), kFirst.size());
  submit_pieces(sink, gradients[1], piece_elements);
  out.squares = sink.squares(0);
  EXPECT_TRUE(planes == Planes(kSumElements)) << "a sum changed the weights";
  return out;
}

template <typename Element, typename Widen>
void check_sums(const std::vector<std::vector<Element>>& gradients, const Widen& widen) {
  std::vector<float> expected(kSumElements, -7.f);
  for (const auto* segments : {&kFirst, &kSecond}) {
    const auto& gradient = gradients[segments == &kFirst ? 0 : 1];
    for (const SumSegment& s : *segments) {
      for (std::size_t i = s.offset; i < s.offset + s.length; ++i) {
        expected[i] = s.first ? widen(gradient[i]) : expected[i] + widen(gradient[i]);
      }
    }
  }
  Sums reference;
  for (const std::string& set : available_instruction_sets()) {
    force_instruction_set(set);
    for (const int threads : {1, 3}) {
      for (const std::size_t blocks : {1, 2, 9}) {
        SCOPED_TRACE(set + ", " + std::to_string(threads) + " threads, pieces of " + std::to_string(blocks) +
                     " blocks");
        const Sums got = add_up(threads, blocks * 16'384, gradients);
        EXPECT_EQ(got.sum, expected);
        if (reference.squares.empty()) {
          reference = got;
          for (std::size_t i = 0; i < kSecond.size(); ++i) {
            double squares = 0;
            for (std::size_t e = kSecond[i].offset; e < kSecond[i].offset + kSecond[i].length; ++e) {
              squares += static_cast<double>(expected[e]) * expected[e];
            }
            EXPECT_NEAR(got.squares[i], squares, 1e-12 * squares) << "segment " << i;
          }
        }
        EXPECT_EQ(got.squares, reference.squares);  // to the bit
      }
      // Pieces that cut blocks: the same sums, and squares but for the order of their addition.
      for (const std::size_t piece : {1'000, 16'385, 33'333}) {
        SCOPED_TRACE(set + ", pieces of " + std::to_string(piece));
        const Sums got = add_up(threads, piece, gradients);
        EXPECT_EQ(got.sum, expected);
        for (std::size_t i = 0; i < kSecond.size(); ++i) {
          EXPECT_NEAR(got.squares[i], reference.squares[i], 1e-12 * reference.squares[i]);
        }
      }
    }
  }
  force_instruction_set("");
}

TEST(AdamWSink, SumsAreExactAndTheirSquaresTheSameEverywhere) {
  const std::vector<std::vector<std::uint16_t>> narrow = {gradient_of(kSumElements, 11), gradient_of(kSumElements, 12)};
  check_sums(narrow, wide);
  std::vector<std::vector<float>> whole(2, std::vector<float>(kSumElements));
  std::mt19937 random(13);
  for (auto& gradient : whole) {
    for (float& g : gradient) g = std::ldexp(std::uniform_real_distribution<float>(-1, 1)(random), random() % 40 - 20);
  }
  check_sums(whole, [](float value) { return value; });
}

// As PyTorch's sums: subnormal numbers count, infinity and NaN spread, and squares outlast float32's range.
TEST(AdamWSink, SumsOfExtremeValues) {
  const float tiny = std::numeric_limits<float>::denorm_min(), huge = 3e38f;
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> gradient = {tiny, huge, inf, nan, 1.f};
  Planes planes(5);
  std::vector<float> sum(5);
  AdamWSink sink(std::make_shared<ThreadPool>(1));
  sink.add_chunk(planes.at(0), 5, GradientType::float32);
  for (const bool first : {true, false}) {
    sink.prepare_sum(0, {{0, 1, first}, {1, 1, first}, {2, 1, first}, {3, 1, first}, {4, 1, first}}, sum.data(),
                     GradientType::float32);
    submit_pieces(sink, gradient, 5);
    const std::vector<double> squares = sink.squares(0);
    if (first) {
      EXPECT_EQ(sum[0], tiny);
      EXPECT_EQ(squares[0], static_cast<double>(tiny) * tiny);
      EXPECT_EQ(squares[1], static_cast<double>(huge) * huge);
    } else {
      EXPECT_EQ(sum[0], 2 * tiny);
      EXPECT_TRUE(std::isinf(sum[1]) && std::isinf(squares[1]));
    }
    EXPECT_TRUE(std::isinf(sum[2]) && std::isinf(squares[2]));
    EXPECT_TRUE(std::isnan(sum[3]) && std::isnan(squares[3]));
    EXPECT_EQ(squares[4], first ? 1. : 4.);
  }
}

// Sums take their turn among updates, and an update may have another gradient type than the chunk's.
TEST(AdamWSink, AnUpdateFromASumEqualsADirectOne) {
  auto pool = std::make_shared<ThreadPool>(2);
  const std::size_t n = 40'000;
  Planes planes(n), expected(n);
  AdamWSink sink(pool);
  sink.add_chunk(planes.at(0), n, GradientType::bfloat16);
  std::vector<float> sum(n), reference(n);
  for (std::int64_t step = 1; step <= 3; ++step) {
    const AdamWHyper hyper{.lr = 1e-2, .step = step, .gradient_scale = 0.25f};
    for (unsigned pass = 0; pass < 3; ++pass) {
      const auto gradient = gradient_of(n, static_cast<unsigned>(step) * 10 + pass);
      sink.prepare_sum(0, {{0, n, pass == 0}}, sum.data(), GradientType::bfloat16);
      submit_pieces(sink, gradient, 16'384);
      for (std::size_t i = 0; i < n; ++i) reference[i] = (pass == 0 ? 0.f : reference[i]) + wide(gradient[i]);
    }
    sink.prepare(0, {{0, n, hyper}}, GradientType::float32);
    submit_pieces(sink, sum, 16'384);
    adamw(*pool, hyper, expected.at(0), reference.data(), GradientType::float32, n);
    EXPECT_TRUE(planes == expected) << step;
  }
}

TEST(AdamWSink, PrepareSumRefusesBadSegmentsAndChangesNothing) {
  Planes planes(100);
  AdamWSink sink(std::make_shared<ThreadPool>(1));
  sink.add_chunk(planes.at(0), 100, GradientType::bfloat16);
  std::vector<float> sum(100, 3.f);
  const auto refused = [&](const std::vector<SumSegment>& segments) {
    return message_of(Code::invalid_argument,
                      [&] { sink.prepare_sum(0, segments, sum.data(), GradientType::bfloat16); });
  };
  EXPECT_TRUE(contains(refused({{0, 101, true}}), "chunk 0, segment 0"));
  refused({{101, 0, true}});
  refused({{50, static_cast<std::size_t>(-1), true}});
  EXPECT_TRUE(contains(refused({{0, 10, true}, {9, 10, true}}), "segment 1"));
  refused({{10, 10, true}, {0, 10, true}});
  message_of(Code::invalid_argument, [&] { sink.prepare_sum(0, {{0, 1, true}}, nullptr, GradientType::bfloat16); });
  message_of(Code::invalid_argument, [&] { sink.prepare_sum(1, {}, sum.data(), GradientType::bfloat16); });
  message_of(Code::invalid_argument, [&] { sink.squares(1); });
  EXPECT_TRUE(contains(message_of(Code::state, [&] { sink.squares(0); }), "chunk 0"));
  message_of(Code::state, [&] { sink.begin(0); });
  EXPECT_EQ(sum, std::vector<float>(100, 3.f));

  // A sum of nothing is one, too.
  sink.prepare_sum(0, {}, sum.data(), GradientType::bfloat16);
  submit(sink, 0, gradient_of(100, 3), 100);
  EXPECT_TRUE(sink.squares(0).empty());
  EXPECT_EQ(sum, std::vector<float>(100, 3.f));
}

TEST(AdamWSink, SumsRefusePiecesThatDoNotFit) {
  Planes planes(100);
  AdamWSink sink(std::make_shared<ThreadPool>(1));
  sink.add_chunk(planes.at(0), 100, GradientType::bfloat16);
  std::vector<float> sum(100), gradient(101);
  sink.prepare_sum(0, {{0, 100, true}}, sum.data(), GradientType::float32);
  sink.discard(0);
  message_of(Code::state, [&] { sink.begin(0); });
  sink.prepare_sum(0, {{0, 100, true}}, sum.data(), GradientType::float32);
  sink.begin(0);
  message_of(Code::invalid_argument, [&] { sink.consume(0, 0, gradient.data(), 404); });
  message_of(Code::invalid_argument, [&] { sink.consume(0, 2, gradient.data(), 4); });
  message_of(Code::invalid_argument, [&] { sink.consume(0, 0, gradient.data(), 6); });
  message_of(Code::invalid_argument, [&] { sink.consume(0, 0, nullptr, 4); });
  sink.consume(0, 0, gradient.data(), 400);
  message_of(Code::state, [&] { sink.squares(0); });  // only once it has ended
  sink.end(0);
  EXPECT_EQ(sink.squares(0), std::vector<double>{0.});
}

// The main thread prepares steps and adds chunks while the update lane consumes.
TEST(AdamWSink, PreparesWhileTheUpdateLaneConsumes) {
  auto pool = std::make_shared<ThreadPool>(2);
  constexpr std::size_t n = 20001;
  constexpr int steps = 60;
  Planes first(n), second(n), expected(n), late(16);
  const auto gradient = gradient_of(n, 6);
  AdamWSink sink(pool);
  sink.add_chunk(first.at(0), n, GradientType::bfloat16);
  sink.add_chunk(second.at(0), n, GradientType::bfloat16);
  std::atomic<int> prepared{0};
  std::thread lane([&] {
    for (int step = 1; step <= steps; ++step) {
      while (prepared < step) std::this_thread::yield();
      for (const std::uint32_t chunk : {1u, 0u}) submit(sink, chunk, gradient, 4096);
    }
  });
  for (int step = 1; step <= steps; ++step) {
    for (const std::uint32_t chunk : {0u, 1u}) sink.prepare(chunk, {{0, n, {.lr = 1e-2, .step = step}}});
    prepared = step;
    sink.add_chunk(late.at(0), 16, GradientType::bfloat16);
  }
  lane.join();
  for (int step = 1; step <= steps; ++step) {
    adamw(*pool, {.lr = 1e-2, .step = step}, expected.at(0), gradient.data(), GradientType::bfloat16, n);
  }
  EXPECT_TRUE(first == expected);
  EXPECT_TRUE(second == expected);
}

}  // namespace
}  // namespace slidecore
