#pragma once
// Spans of work on device streams, measured by pairs of timing events and entered in the trace once they are done.

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>

#include "scheduler/events.h"
#include "slidecore/trace.h"

namespace slidecore {

class DeviceSpans {
 public:
  DeviceSpans(std::shared_ptr<Device> device, EventPool& events, Trace& trace);

  // Aligns the device's clock with the trace's: call on an idle device, right after Trace::enable().
  void start(StreamHandle stream);

  // Records a timing event on `stream`; 0 (and nothing recorded) while the trace is off.
  EventHandle mark(StreamHandle stream);

  // The span between two marks; takes both over. `keep_end` leaves the end mark with the caller, as the start of a
  // following span. Does nothing if a mark is 0.
  void add(Lane lane, SpanKind kind, std::int32_t chunk, EventHandle start, EventHandle end, std::uint64_t bytes,
           bool keep_end = false);

  void discard(EventHandle mark);

  // Enters finished spans in the trace; with `all`, waits for the unfinished ones.
  void resolve(bool all);

 private:
  struct Pending {
    Span span;
    EventHandle start, end;
    bool keep_end;
  };
  void resolve_front();

  std::shared_ptr<Device> device_;
  EventPool& events_;
  Trace& trace_;
  std::mutex mutex_;
  std::deque<Pending> pending_;
  std::atomic<EventHandle> epoch_{0};  // 0: not started, as when someone enabled the trace without start_trace()
};

}  // namespace slidecore
