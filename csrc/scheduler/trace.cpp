#include "slidecore/trace.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>

namespace slidecore {
namespace {

std::int64_t steady_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::string json_escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(c));
      out += code;
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace

const char* lane_name(Lane lane) {
  static constexpr std::array<const char*, kLanes> names{"compute", "upload", "download", "update", "disk"};
  return names[static_cast<std::size_t>(lane)];
}

const char* span_kind_name(SpanKind kind) {
  static constexpr std::array<const char*, 11> names{"forward",  "backward",   "wait",        "weights",
                                                     "gradient", "save input", "fetch input", "update",
                                                     "sum",      "read",       "write"};
  return names[static_cast<std::size_t>(kind)];
}

void Trace::enable() {
  std::lock_guard lock(mutex_);
  ring_.clear();
  next_ = 0;
  dropped_ = 0;
  epoch_ns_ = steady_ns();
  enabled_.store(true, std::memory_order_relaxed);
}

void Trace::disable() {
  enabled_.store(false, std::memory_order_relaxed);
}

std::int64_t Trace::now_ns() const {
  if (!enabled()) return 0;
  std::lock_guard lock(mutex_);
  return steady_ns() - epoch_ns_;
}

std::int64_t Trace::since_ns(std::chrono::steady_clock::time_point time) const {
  const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
  const std::lock_guard lock(mutex_);
  return ns - epoch_ns_;
}

void Trace::add(const Span& span) {
  std::lock_guard lock(mutex_);
  if (ring_.size() < capacity_) {
    ring_.push_back(span);
    return;
  }
  ++dropped_;
  if (capacity_ == 0) return;
  ring_[next_] = span;
  next_ = (next_ + 1) % capacity_;
}

std::vector<Span> Trace::spans() const {
  std::lock_guard lock(mutex_);
  std::vector<Span> ordered(ring_.begin() + static_cast<std::ptrdiff_t>(next_), ring_.end());
  ordered.insert(ordered.end(), ring_.begin(), ring_.begin() + static_cast<std::ptrdiff_t>(next_));
  return ordered;
}

TraceSummary Trace::summary() const {
  TraceSummary summary;
  std::vector<Span> all = spans();
  {
    std::lock_guard lock(mutex_);
    summary.dropped = dropped_;
  }
  if (all.empty()) return summary;
  std::sort(all.begin(), all.end(), [](const Span& a, const Span& b) { return a.start_ns < b.start_ns; });
  std::int64_t last = all.front().end_ns;
  std::int64_t covered[kLanes];
  std::fill(std::begin(covered), std::end(covered), all.front().start_ns);
  for (const Span& span : all) {
    const auto lane = static_cast<std::size_t>(span.lane);
    last = std::max(last, span.end_ns);
    if (span.kind == SpanKind::wait) {
      summary.exposed_wait_s += static_cast<double>(span.end_ns - span.start_ns) * 1e-9;
      continue;
    }
    LaneSummary& l = summary.lanes[lane];
    ++l.spans;
    l.bytes += span.bytes;
    // Spans that overlap on one lane count once.
    const std::int64_t from = std::max(span.start_ns, covered[lane]);
    if (span.end_ns > from) {
      l.busy_s += static_cast<double>(span.end_ns - from) * 1e-9;
      covered[lane] = span.end_ns;
    }
  }
  summary.wall_s = static_cast<double>(last - all.front().start_ns) * 1e-9;
  for (LaneSummary& lane : summary.lanes) lane.busy_share = summary.wall_s > 0 ? lane.busy_s / summary.wall_s : 0;
  return summary;
}

std::string Trace::to_chrome_json(const std::vector<std::string>& chunk_names) const {
  std::string out = "[\n";
  char line[256];
  for (int lane = 0; lane < kLanes; ++lane) {
    std::snprintf(line, sizeof line, R"({"ph":"M","pid":1,"tid":%d,"name":"thread_name","args":{"name":"%s"}},)", lane,
                  lane_name(static_cast<Lane>(lane)));
    out += line;
    out += '\n';
  }
  for (const Span& span : spans()) {
    const bool named = span.chunk >= 0 && static_cast<std::size_t>(span.chunk) < chunk_names.size();
    out += R"({"ph":"X","pid":1,"tid":)" + std::to_string(static_cast<int>(span.lane)) + R"(,"name":")";
    out += span_kind_name(span.kind);
    if (named) out += ' ' + json_escaped(chunk_names[static_cast<std::size_t>(span.chunk)]);
    std::snprintf(line, sizeof line, R"(","ts":%.3f,"dur":%.3f,"args":{"bytes":%llu}},)",
                  static_cast<double>(span.start_ns) * 1e-3, static_cast<double>(span.end_ns - span.start_ns) * 1e-3,
                  static_cast<unsigned long long>(span.bytes));
    out += line;
    out += '\n';
  }
  if (out.size() >= 2 && out[out.size() - 2] == ',') out.erase(out.size() - 2, 1);
  return out + "]\n";
}

}  // namespace slidecore
