// What the trace records, the figures made of it, and its export.

#include "slidecore/trace.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>
#include <stdexcept>

#include "scheduler_support.h"
#include "slidecore/scheduler.h"

namespace slidecore {
namespace {

using namespace testing_support;

// A strict reader of JSON (RFC 8259), as far as a trace needs a value: objects' members and arrays' elements in
// order, strings unescaped, numbers as doubles.
struct Json {
  enum class Type { number, string, array, object };
  Type type = Type::number;
  double number = 0;
  std::string string;
  std::vector<Json> elements;
  std::vector<std::pair<std::string, Json>> members;

  const Json& operator[](const std::string& key) const {
    for (const auto& [name, value] : members) {
      if (name == key) return value;
    }
    throw std::runtime_error("no member " + key);
  }
};

class JsonReader {
 public:
  static Json read(const std::string& text) {
    JsonReader reader(text);
    Json value = reader.value();
    reader.space();
    if (reader.at_ != text.size()) reader.fail("text after the value");
    return value;
  }

 private:
  explicit JsonReader(const std::string& text) : text_(text) {}
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(what + " at " + std::to_string(at_) + ": " + text_.substr(at_, 40));
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  char next() {
    if (at_ == text_.size()) fail("the text ends");
    return text_[at_++];
  }
  void expect(char c) {
    if (next() != c) {
      --at_;
      fail(std::string("not a ") + c);
    }
  }
  void space() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r') ++at_;
  }
  Json value() {
    space();
    Json out;
    switch (peek()) {
      case '{':
        object(out);
        break;
      case '[':
        array(out);
        break;
      case '"':
        out.type = Json::Type::string;
        out.string = string();
        break;
      default:
        out.type = Json::Type::number;
        out.number = number();
    }
    return out;
  }
  void object(Json& out) {
    out.type = Json::Type::object;
    std::set<std::string> seen;
    expect('{');
    space();
    if (peek() == '}') {
      ++at_;
      return;
    }
    for (;;) {
      space();
      std::string key = string();
      if (!seen.insert(key).second) fail("a member twice");
      space();
      expect(':');
      out.members.emplace_back(std::move(key), value());
      space();
      if (peek() == '}') break;
      expect(',');
    }
    ++at_;
  }
  void array(Json& out) {
    out.type = Json::Type::array;
    expect('[');
    space();
    if (peek() == ']') {
      ++at_;
      return;
    }
    for (;;) {
      out.elements.push_back(value());
      space();
      if (peek() == ']') break;
      expect(',');
    }
    ++at_;
  }
  std::string string() {
    std::string out;
    expect('"');
    for (;;) {
      const char c = next();
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) fail("a raw control character");
      if (c != '\\') {
        out += c;
        continue;
      }
      const char escape = next();
      if (escape == 'u') {
        unsigned code = 0;
        for (int i = 0; i < 4; ++i) {
          const char digit = next();
          if (std::isxdigit(static_cast<unsigned char>(digit)) == 0) fail("a bad escape");
          code = code * 16 + static_cast<unsigned>(std::stoi(std::string(1, digit), nullptr, 16));
        }
        if (code > 0x7f) fail("an escape that this reader does not need");
        out += static_cast<char>(code);
      } else if (const auto found = std::string("\"\\/bfnrt").find(escape); found != std::string::npos) {
        out += "\"\\/\b\f\n\r\t"[found];
      } else {
        fail("a bad escape");
      }
    }
  }
  double number() {
    const std::size_t begin = at_;
    if (peek() == '-') ++at_;
    if (std::isdigit(static_cast<unsigned char>(peek())) == 0) fail("not a value");
    if (peek() == '0') {
      ++at_;
    } else {
      digits();
    }
    if (peek() == '.') {
      ++at_;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    return std::stod(text_.substr(begin, at_ - begin));
  }
  void digits() {
    if (std::isdigit(static_cast<unsigned char>(peek())) == 0) fail("not a digit");
    while (std::isdigit(static_cast<unsigned char>(peek())) != 0) ++at_;
  }

  const std::string& text_;
  std::size_t at_ = 0;
};

constexpr Lane kCompute = Lane::compute, kUpload = Lane::upload, kUpdate = Lane::update;

TEST(Trace, KeepsTheNewestSpansAndCountsTheRest) {
  for (const std::size_t capacity : {0, 1, 3, 100}) {
    SCOPED_TRACE(capacity);
    Trace trace(capacity);
    trace.enable();
    for (int i = 0; i < 10; ++i) trace.add({kUpload, SpanKind::weights, i, i, i + 1, 1});
    const std::vector<Span> spans = trace.spans();
    const std::size_t kept = std::min<std::size_t>(capacity, 10);
    ASSERT_EQ(spans.size(), kept);
    for (std::size_t i = 0; i < kept; ++i) EXPECT_EQ(spans[i].chunk, static_cast<std::int32_t>(10 - kept + i));
    EXPECT_EQ(trace.summary().dropped, 10 - kept);
    EXPECT_EQ(trace.summary().lanes[1].spans, kept);
    trace.enable();
    EXPECT_TRUE(trace.spans().empty());
    EXPECT_EQ(trace.summary().dropped, 0u);
  }
}

TEST(Trace, ItsClockStartsWhenItIsEnabled) {
  Trace trace;
  EXPECT_FALSE(trace.enabled());
  EXPECT_EQ(trace.now_ns(), 0);
  trace.enable();
  EXPECT_TRUE(trace.enabled());
  const std::int64_t first = trace.now_ns();
  EXPECT_GE(first, 0);
  EXPECT_GE(trace.now_ns(), first);
  trace.disable();
  EXPECT_FALSE(trace.enabled());
}

TEST(Trace, TheSummaryOfNothingIsZero) {
  const TraceSummary summary = Trace().summary();
  EXPECT_EQ(summary.wall_s, 0);
  EXPECT_EQ(summary.exposed_wait_s, 0);
  for (const LaneSummary& lane : summary.lanes) {
    EXPECT_EQ(lane.spans, 0u);
    EXPECT_EQ(lane.busy_s, 0);
    EXPECT_EQ(lane.busy_share, 0);
  }
}

TEST(Trace, OverlapsCountOnceAndWaitsAreNotBusy) {
  Trace trace;
  const auto at = [](std::int64_t seconds) { return seconds * 1'000'000'000; };
  // Upload: [2, 6], [3, 4] inside, [5, 8] beyond, [10, 11] apart, and one of no length. Not in order of their start.
  trace.add({kUpload, SpanKind::weights, 0, at(10), at(11), 5});
  trace.add({kUpload, SpanKind::weights, 0, at(5), at(8), 10});
  trace.add({kUpload, SpanKind::input_in, 1, at(2), at(6), 20});
  trace.add({kUpload, SpanKind::weights, 2, at(3), at(4), 40});
  trace.add({kUpload, SpanKind::weights, 2, at(9), at(9), 0});
  trace.add({kCompute, SpanKind::wait, 0, at(0), at(3), 0});
  trace.add({kCompute, SpanKind::visit_forward, 0, at(3), at(7), 0});
  trace.add({kCompute, SpanKind::wait, 1, at(7), at(8), 0});
  trace.add({kCompute, SpanKind::visit_backward, 1, at(8), at(9), 0});
  trace.add({kUpdate, SpanKind::update, 1, at(15), at(20), 80});
  const TraceSummary summary = trace.summary();
  EXPECT_DOUBLE_EQ(summary.wall_s, 20);
  EXPECT_DOUBLE_EQ(summary.exposed_wait_s, 4);
  EXPECT_EQ(summary.dropped, 0u);
  const double busy[kLanes] = {5, 7, 0, 5, 0};
  const std::uint64_t bytes[kLanes] = {0, 75, 0, 80, 0}, spans[kLanes] = {2, 5, 0, 1, 0};
  for (int lane = 0; lane < kLanes; ++lane) {
    SCOPED_TRACE(lane_name(static_cast<Lane>(lane)));
    EXPECT_DOUBLE_EQ(summary.lanes[lane].busy_s, busy[lane]);
    EXPECT_DOUBLE_EQ(summary.lanes[lane].busy_share, busy[lane] / 20);
    EXPECT_EQ(summary.lanes[lane].bytes, bytes[lane]);
    EXPECT_EQ(summary.lanes[lane].spans, spans[lane]);
  }
}

// Against a count of every nanosecond.
TEST(Trace, BusyTimeIsTheUnionOfTheSpans) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  for (int round = 0; round < 30; ++round) {
    Trace trace;
    std::map<Lane, std::set<std::int64_t>> busy;
    std::int64_t waited = 0, first = 1000, last = 0;
    for (int i = draw<int>(random, 1, 40); i > 0; --i) {
      const auto lane = static_cast<Lane>(draw<int>(random, 0, kLanes - 1));
      const auto start = draw<std::int64_t>(random, 0, 300), end = start + draw<std::int64_t>(random, 0, 40);
      const bool wait = lane == Lane::compute && random() % 3 == 0;
      trace.add({lane, wait ? SpanKind::wait : SpanKind::weights, 0, start, end, 0});
      if (wait) waited += end - start;
      for (std::int64_t t = start; t < end && !wait; ++t) busy[lane].insert(t);
      first = std::min(first, start);
      last = std::max(last, end);
    }
    const TraceSummary summary = trace.summary();
    EXPECT_NEAR(summary.wall_s * 1e9, static_cast<double>(last - first), 1e-6);
    EXPECT_NEAR(summary.exposed_wait_s * 1e9, static_cast<double>(waited), 1e-6);
    for (int lane = 0; lane < kLanes; ++lane) {
      EXPECT_NEAR(summary.lanes[lane].busy_s * 1e9, static_cast<double>(busy[static_cast<Lane>(lane)].size()), 1e-6);
    }
  }
}

TEST(Trace, TheJsonReaderIsStrict) {
  for (const char* bad : {"", "[", "[1,]", "{\"a\":1,}", "[01]", "[1 2]", "\"\n\"", "\"\\x\"", "{\"a\":1,\"a\":2}",
                          "[] x", "[nan]", "[1.]", "[-]", "\"open"}) {
    EXPECT_THROW(JsonReader::read(bad), std::runtime_error) << bad;
  }
  EXPECT_EQ(JsonReader::read(" [1, -2.5e1, {\"a\\u0041\": \"\\\"\"}]\n").elements[2]["aA"].string, "\"");
}

// What a trace of `names` must look like: the lanes' names, then its spans.
void expect_events(const std::string& text, const std::vector<Span>& spans, const std::vector<std::string>& names) {
  const Json json = JsonReader::read(text);
  ASSERT_EQ(json.type, Json::Type::array);
  ASSERT_EQ(json.elements.size(), kLanes + spans.size());
  for (int lane = 0; lane < kLanes; ++lane) {
    const Json& event = json.elements[static_cast<std::size_t>(lane)];
    EXPECT_EQ(event["ph"].string, "M");
    EXPECT_EQ(event["name"].string, "thread_name");
    EXPECT_EQ(event["tid"].number, lane);
    EXPECT_EQ(event["args"]["name"].string, lane_name(static_cast<Lane>(lane)));
  }
  for (std::size_t i = 0; i < spans.size(); ++i) {
    const Json& event = json.elements[kLanes + i];
    std::string name = span_kind_name(spans[i].kind);
    if (spans[i].chunk >= 0 && static_cast<std::size_t>(spans[i].chunk) < names.size()) {
      name += ' ' + names[static_cast<std::size_t>(spans[i].chunk)];
    }
    EXPECT_EQ(event["ph"].string, "X");
    EXPECT_EQ(event["name"].string, name);
    EXPECT_EQ(event["tid"].number, static_cast<double>(spans[i].lane));
    EXPECT_NEAR(event["ts"].number, static_cast<double>(spans[i].start_ns) * 1e-3, 1e-3);
    EXPECT_NEAR(event["dur"].number, static_cast<double>(spans[i].end_ns - spans[i].start_ns) * 1e-3, 1e-3);
    EXPECT_EQ(event["args"]["bytes"].number, static_cast<double>(spans[i].bytes));
  }
}

TEST(Trace, ExportsWellFormedJson) {
  std::string control;
  for (char c = 1; c < 0x20; ++c) control += c;
  const std::vector<std::string> names = {"plain", "quote \" and \\ backslash", control, "Schlußblock ✓",
                                          std::string(500, 'x')};
  Trace trace;
  expect_events(trace.to_chrome_json(names), {}, names);
  std::vector<Span> spans;
  for (int kind = 0; kind < 10; ++kind) {
    for (std::int32_t chunk = -1; chunk < 7; ++chunk) {
      spans.push_back({static_cast<Lane>(kind % kLanes), static_cast<SpanKind>(kind), chunk, kind * 1000 + 7,
                       kind * 5000 + 8, static_cast<std::uint64_t>(kind) << 40});
      trace.add(spans.back());
    }
  }
  expect_events(trace.to_chrome_json(names), spans, names);
  expect_events(trace.to_chrome_json({}), spans, {});
}

TEST(SchedulerTrace, RecordsNothingWhileItIsOff) {
  Rig rig(host_device(), equal_chunks(3, 5'000), {2}, 1);
  for (int step = 0; step < 2; ++step) rig.step();
  rig.scheduler->synchronize();
  EXPECT_TRUE(rig.scheduler->trace().spans().empty());
  rig.scheduler->start_trace();
  rig.step();
  rig.scheduler->stop_trace();
  const std::size_t spans = rig.scheduler->trace().spans().size();
  EXPECT_GT(spans, 0u);
  rig.step();
  rig.scheduler->synchronize();
  EXPECT_EQ(rig.scheduler->trace().spans().size(), spans);
}

TEST(SchedulerTrace, EachTransferVisitAndUpdateIsASpan) {
  const auto device = host_device();
  const StreamHandle stream = device->create_stream();
  {
    constexpr std::size_t bytes = 3 * 4096 + 100;
    Rig rig(device, equal_chunks(3, bytes), {2}, 2);
    rig.scheduler->set_schedule(training_schedule(3));
    rig.step(stream);
    rig.check_visits();
    rig.scheduler->start_trace();
    const Scheduler::Counters before = rig.scheduler->counters();
    for (int step = 0; step < 2; ++step) rig.step(stream);
    Bytes host(777), memory(777);
    const Ticket saved = rig.scheduler->save_input(1, host.data(), memory.data(), 777, stream);
    rig.scheduler->fetch_input(1, memory.data(), host.data(), 700, stream, saved);
    rig.check_visits();
    rig.scheduler->stop_trace();
    const Scheduler::Counters after = rig.scheduler->counters();

    const std::vector<Span> spans = rig.scheduler->trace().spans();
    std::map<std::pair<Lane, SpanKind>, std::pair<std::uint64_t, std::uint64_t>> found;  // count and bytes
    for (const Span& span : spans) {
      auto& [count, sum] = found[{span.lane, span.kind}];
      ++count;
      sum += span.bytes;
      EXPECT_GE(span.start_ns, 0);
      EXPECT_LE(span.start_ns, span.end_ns);
      EXPECT_GE(span.chunk, 0);
      EXPECT_LT(span.chunk, 3);
    }
    using Sum = std::pair<std::uint64_t, std::uint64_t>;
    EXPECT_EQ(found.size(), 8u);
    EXPECT_EQ((found[{Lane::compute, SpanKind::visit_forward}]), (Sum{6, 0}));
    EXPECT_EQ((found[{Lane::compute, SpanKind::visit_backward}]), (Sum{6, 0}));
    EXPECT_EQ((found[{Lane::compute, SpanKind::wait}]), (Sum{12, 0}));
    EXPECT_EQ((found[{Lane::upload, SpanKind::weights}]),
              (Sum{after.uploads - before.uploads, after.upload_bytes - before.upload_bytes}));
    EXPECT_EQ((found[{Lane::upload, SpanKind::input_in}]), (Sum{1, 700}));
    EXPECT_EQ((found[{Lane::download, SpanKind::gradient}]), (Sum{6 * 4, 6 * bytes}));
    EXPECT_EQ((found[{Lane::download, SpanKind::input_out}]), (Sum{1, 777}));
    EXPECT_EQ((found[{Lane::update, SpanKind::update}]), (Sum{6 * 4, 6 * bytes}));

    const TraceSummary summary = rig.scheduler->trace().summary();
    EXPECT_GT(summary.wall_s, 0);
    for (const LaneSummary& lane : summary.lanes) {
      EXPECT_GE(lane.busy_s, 0);
      EXPECT_LE(lane.busy_share, 1 + 1e-9);
    }
    std::vector<std::string> names;
    for (std::size_t c = 0; c < 3; ++c) names.push_back(Rig::name(c));
    expect_events(rig.scheduler->chrome_trace(), spans, names);
  }
  device->destroy_stream(stream);
}

TEST(SchedulerTrace, ASmallRingKeepsTheNewest) {
  SchedulerOptions options = kSmallPieces;
  for (const std::size_t capacity : {0, 5}) {
    options.trace_spans = capacity;
    Rig rig(host_device(), equal_chunks(2, 9'000), {2}, 3, options);
    rig.scheduler->start_trace();
    for (int step = 0; step < 3; ++step) rig.step();
    rig.scheduler->stop_trace();
    EXPECT_EQ(rig.scheduler->trace().spans().size(), capacity);
    EXPECT_GT(rig.scheduler->trace().summary().dropped, 0u);
    JsonReader::read(rig.scheduler->chrome_trace());
    rig.check_planes();
  }
}

// A visit that is in progress when traces start and stop.
TEST(SchedulerTrace, AVisitMayOutlastATrace) {
  Rig rig(host_device(), equal_chunks(3, 9'000), {2}, 4);
  rig.acquire(0, Phase::forward);
  rig.scheduler->start_trace();
  rig.scheduler->release(0, Phase::forward, 0);
  rig.acquire(1, Phase::forward);
  rig.scheduler->stop_trace();
  ASSERT_EQ(rig.scheduler->trace().spans().size(), 2u);  // its upload and its wait
  rig.acquire(0, Phase::forward);
  rig.scheduler->release(0, Phase::forward, 0);
  rig.scheduler->start_trace();
  rig.scheduler->release(1, Phase::forward, 0);
  rig.visit(2, Phase::backward);
  rig.scheduler->stop_trace();
  const std::vector<Span> spans = rig.scheduler->trace().spans();
  EXPECT_EQ(spans.size(), 4u);
  for (const Span& span : spans) {
    EXPECT_GE(span.start_ns, 0);
    EXPECT_GE(span.end_ns, span.start_ns);
    EXPECT_LT(static_cast<double>(span.end_ns) * 1e-9, 3600);
  }
  rig.scheduler->start_trace();
  rig.acquire(2, Phase::backward);
  rig.scheduler->trace().disable();
  rig.scheduler->release(2, Phase::backward, 0);
  rig.scheduler->start_trace();
  EXPECT_TRUE(rig.scheduler->trace().spans().empty());
}

// Device spans need the clocks aligned, which only start_trace() does; without that there are spans of updates alone.
TEST(SchedulerTrace, EnablingItDirectlyDoesNoHarm) {
  Rig rig(host_device(), equal_chunks(2, 5'000), {2}, 5);
  rig.scheduler->trace().enable();
  rig.step();
  rig.check_planes();
  for (const Span& span : rig.scheduler->trace().spans()) EXPECT_EQ(span.lane, Lane::update);
  rig.scheduler->trace().disable();
  rig.scheduler->stop_trace();
  rig.scheduler->check();
}

// More spans than are kept unresolved at a time, while threads read the trace.
TEST(SchedulerTrace, IsReadWhileItGrows) {
  SchedulerOptions options = kSmallPieces;
  options.trace_spans = 1000;
  Rig rig(host_device(), equal_chunks(2, 3 * 4096), {2}, 6, options);
  rig.scheduler->start_trace();
  std::atomic<bool> ended{false};
  std::thread reader([&] {
    for (int i = 0; i < 20 || !ended; ++i) {
      JsonReader::read(rig.scheduler->chrome_trace());
      EXPECT_LE(rig.scheduler->trace().summary().lanes[1].busy_share, 1 + 1e-9);
      if (ended) break;
    }
  });
  for (int step = 0; step < 60; ++step) rig.step();
  ended = true;
  reader.join();
  rig.check_planes();
  for (int visit = 0; visit < 3000; ++visit) rig.visit(0, Phase::forward);
  rig.scheduler->stop_trace();
  EXPECT_EQ(rig.scheduler->trace().spans().size(), 1000u);
}

}  // namespace
}  // namespace slidecore
