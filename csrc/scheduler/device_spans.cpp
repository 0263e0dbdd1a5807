#include "scheduler/device_spans.h"

#include <algorithm>

namespace slidecore {
namespace {
constexpr std::size_t kMaxPending = 4096;  // bounds the number of live timing events
}

DeviceSpans::DeviceSpans(std::shared_ptr<Device> device, EventPool& events, Trace& trace)
    : device_(std::move(device)), events_(events), trace_(trace) {}

void DeviceSpans::start(StreamHandle stream) {
  std::lock_guard lock(mutex_);
  const EventHandle epoch = epoch_ != 0 ? epoch_.load() : events_.take(true);
  device_->record(epoch, stream);
  device_->synchronize_event(epoch);
  epoch_ = epoch;
}

EventHandle DeviceSpans::mark(StreamHandle stream) {
  if (!trace_.enabled() || epoch_ == 0) return 0;
  EventHandle event = events_.take(true);
  device_->record(event, stream);
  return event;
}

void DeviceSpans::discard(EventHandle mark) {
  if (mark != 0) events_.give(mark, true);
}

void DeviceSpans::add(Lane lane, SpanKind kind, std::int32_t chunk, EventHandle start, EventHandle end,
                      std::uint64_t bytes, bool keep_end) {
  if (start == 0 || end == 0) {
    discard(start);
    if (!keep_end) discard(end);
    return;
  }
  std::lock_guard lock(mutex_);
  pending_.push_back({Span{lane, kind, chunk, 0, 0, bytes}, start, end, keep_end});
  while (pending_.size() > kMaxPending) resolve_front();
}

void DeviceSpans::resolve_front() {
  Pending p = pending_.front();
  pending_.pop_front();
  device_->synchronize_event(p.end);
  // What began before the trace did is shown from there on.
  p.span.start_ns = std::max<std::int64_t>(0, static_cast<std::int64_t>(device_->elapsed_ms(epoch_, p.start) * 1e6));
  p.span.end_ns = static_cast<std::int64_t>(device_->elapsed_ms(epoch_, p.end) * 1e6);
  if (p.span.end_ns >= p.span.start_ns) trace_.add(p.span);
  events_.give(p.start, true);
  // A kept end is the start of a later span in this queue, which gives it back.
  if (!p.keep_end) events_.give(p.end, true);
}

void DeviceSpans::resolve(bool all) {
  std::lock_guard lock(mutex_);
  while (!pending_.empty() && (all || device_->done(pending_.front().end))) resolve_front();
}

}  // namespace slidecore
