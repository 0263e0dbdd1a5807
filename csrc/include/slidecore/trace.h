#pragma once
// A bounded record of what each lane did and when. Off by default; recording costs one short lock per entry.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace slidecore {

enum class Lane : std::uint8_t { compute, upload, download, update, disk };
inline constexpr int kLanes = 5;
const char* lane_name(Lane lane);

enum class SpanKind : std::uint8_t {
  visit_forward,
  visit_backward,
  wait,
  weights,
  gradient,
  input_out,
  input_in,
  update,
  sum,
  read,
  write
};
const char* span_kind_name(SpanKind kind);

struct Span {
  Lane lane;
  SpanKind kind;
  std::int32_t chunk;     // -1: none
  std::int64_t start_ns;  // since the trace was enabled
  std::int64_t end_ns;
  std::uint64_t bytes;
};

struct LaneSummary {
  double busy_s = 0;      // union of the lane's spans (waits excluded)
  double busy_share = 0;  // of the time between the first and the last span of all lanes
  std::uint64_t bytes = 0;
  std::uint64_t spans = 0;
};

struct TraceSummary {
  double wall_s = 0;
  LaneSummary lanes[kLanes];
  double exposed_wait_s = 0;  // compute lane: time that visits waited for their slot
  std::uint64_t dropped = 0;  // spans lost because the ring was full
};

class Trace {
 public:
  explicit Trace(std::size_t capacity = 1 << 16) : capacity_(capacity) {}
  void enable();  // clears, and starts the clock at zero
  void disable();
  bool enabled() const { return enabled_.load(std::memory_order_relaxed); }
  std::int64_t now_ns() const;                                              // since enable()
  std::int64_t since_ns(std::chrono::steady_clock::time_point time) const;  // likewise
  void add(const Span& span);       // overwrites the oldest when full, and counts it as dropped
  std::vector<Span> spans() const;  // oldest first
  TraceSummary summary() const;
  // Chrome trace format (JSON array of complete events, one thread per lane), as Perfetto and chrome://tracing read it.
  std::string to_chrome_json(const std::vector<std::string>& chunk_names) const;

 private:
  const std::size_t capacity_;
  std::atomic<bool> enabled_{false};
  mutable std::mutex mutex_;
  std::int64_t epoch_ns_ = 0;
  std::vector<Span> ring_;
  std::size_t next_ = 0;
  std::uint64_t dropped_ = 0;
};

}  // namespace slidecore
