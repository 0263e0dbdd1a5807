#pragma once
// The scheduler's state. One mutex guards all of it; lanes sleep on one condition variable. Driver calls that may
// block (waiting on the host backend's stream 0, synchronizing) are made without the mutex.

#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <list>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "scheduler/device_spans.h"
#include "scheduler/events.h"
#include "slidecore/scheduler.h"

namespace slidecore {

// The last work of visits on one stream that read a slot.
struct Release {
  StreamHandle stream;
  EventHandle event;
};

struct Slot {
  void* address = nullptr;
  std::int32_t occupant = -1;     // chunk whose current weights are here or on their way, -1: none
  std::uint64_t upload = 0;       // id of the upload that fills it; an older queued upload is void
  bool issued = false;            // that upload is on the upload stream: `ready` can be waited for
  int pins = 0;                   // visits that hold it
  EventHandle ready = 0;          // the upload into it
  std::vector<Release> released;  // visits' work in it since the last upload, one event for each stream
};

struct Window {
  std::size_t slot_bytes = 0;
  std::vector<Slot> slots;
};

// A visit in progress.
struct Hold {
  std::uint32_t slot;
  std::thread::id thread;
  bool granted = false;   // acquire() has returned or is about to; else it waits for the upload
  EventHandle began = 0;  // timing event, if traced
};

struct Chunk {
  ChunkSpec spec;
  std::int32_t slot = -1;       // in its window, -1: not there
  std::list<Hold> held;         // innermost last
  std::uint64_t submitted = 0;  // updates asked for
  std::uint64_t updated = 0;    // updates done
  std::uint64_t to_sum = 0;     // gradients handed over to be added to a sum
  std::uint64_t summed = 0;     // of these, added
  bool update_due = false;      // a visit that ends in an update was passed, its gradient is still to come
  int reading = 0;              // uploads being put on the stream right now
  EventHandle last_upload = 0;  // its own event, after the last upload that read the plane; 0: none yet

  std::list<Hold>::iterator hold_to_release(std::thread::id thread);
};

struct UploadTask {
  bool is_weights;
  std::uint32_t window = 0, slot = 0;
  std::uint64_t upload = 0;
  std::int32_t chunk = -1;
  void* device = nullptr;
  const void* host = nullptr;
  std::size_t bytes = 0;
  EventHandle after_work = 0;
  Ticket after = 0, ticket = 0;
  std::shared_ptr<const Region> on_disk = nullptr;  // of an input, in the place of `host`
};

enum class Download : std::uint8_t { to_update, to_sum, saved_gradient, input };

struct DownloadTask {
  Download kind = Download::input;
  std::int32_t chunk = -1;
  const void* device = nullptr;
  void* host = nullptr;  // null: the pieces go through the ring to the sink
  std::size_t bytes = 0;
  std::uint64_t after_updates = 0;  // of the chunk, asked for before this one
  std::uint64_t after_sums = 0;     // of the chunk, asked for before this one
  EventHandle after_work = 0;
  Ticket ticket = 0;
  std::shared_ptr<const Region> on_disk = nullptr;  // of an input, in the place of `host`
};

// A piece of a gradient for the sink.
struct UpdateTask {
  std::uint32_t chunk;
  std::size_t offset, bytes;
  const void* piece;
  EventHandle landed;  // of a piece in the ring; 0: it is in the caller's memory
  bool first, last;
  bool changes_weights;
  // Of the chunk: their order is that of the calls, and a sum must not change under an update.
  std::uint64_t after_updates = 0;
  std::uint64_t after_sums = 0;  // likewise; only updates that are staged look at it
  enum class Stage : std::uint8_t { none, needed, asked_for, staged } stage = Stage::none;
  bool has_landed = false;  // `landed` was seen to be done
};

// What a piece still waits for, what is over soonest first.
enum class Awaits : std::uint8_t { nothing, read, landing };

struct PieceChoice {
  std::size_t index;  // in the queue of updates; its size: there is none to take
  Awaits awaits;
};

// An update from a gradient in the caller's memory, once it is there: downloaded, or added up.
struct HostUpdate {
  std::uint32_t chunk;
  const char* gradient;
  std::size_t bytes;
  Ticket after;
  std::uint64_t after_sums, after_updates;
};

inline constexpr std::uint64_t kNever = ~std::uint64_t{0};

struct Scheduler::Impl {
  Impl(std::shared_ptr<Device> device, std::vector<ChunkSpec> chunks, std::vector<WindowSpec> windows,
       std::shared_ptr<GradientSink> sink, SchedulerOptions options);
  ~Impl();
  Impl(std::shared_ptr<Device> device, std::shared_ptr<GradientSink> sink, SchedulerOptions options);

  // windows.cpp; all need the mutex
  void set_position(std::uint32_t chunk, Phase phase);
  void prefetch();
  void assign(std::uint32_t chunk, std::uint32_t slot);
  std::int32_t victim(const Window& window, const std::vector<bool>& keep) const;
  std::size_t next_use(std::int32_t chunk) const;
  void drop_copies(std::uint32_t chunk);
  void pass_update(std::uint32_t chunk);

  // lanes.cpp
  void run_lane(const char* name, void (Impl::*step)(std::unique_lock<std::mutex>&));
  void upload_step(std::unique_lock<std::mutex>& lock);
  void download_step(std::unique_lock<std::mutex>& lock);
  void update_step(std::unique_lock<std::mutex>& lock);
  bool upload_ready(const UploadTask& task) const;
  bool upload_void(const UploadTask& task) const;
  void upload_weights(const UploadTask& task, std::unique_lock<std::mutex>& lock);
  void upload_input(const UploadTask& task, std::unique_lock<std::mutex>& lock);
  void download_in_pieces(const DownloadTask& task, std::unique_lock<std::mutex>& lock);
  void download_whole(const DownloadTask& task, std::unique_lock<std::mutex>& lock);
  bool host_update_ready() const;
  void queue_update(UpdateTask task);
  void queue_from_host(const HostUpdate& update, std::unique_lock<std::mutex>& lock);
  std::size_t urgency(std::uint32_t chunk) const;
  bool landed(UpdateTask& task);
  PieceChoice most_urgent_piece();
  void consume(const UpdateTask& task, std::unique_lock<std::mutex>& lock);
  std::string of_chunk(std::int32_t chunk) const;

  // disk_lane.cpp
  void disk_step(std::unique_lock<std::mutex>& lock);
  std::size_t most_urgent_to_stage();
  void upload_from_disk(const std::shared_ptr<const Region>& region, void* address, std::size_t bytes, SpanKind kind,
                        std::int32_t chunk);
  std::vector<Ticket> download_to_disk(const DownloadTask& task);
  template <class Transfer>
  void transfer_directly(StreamHandle after, SpanKind kind, std::int32_t chunk, std::size_t bytes,
                         const Transfer& transfer);
  void upload_directly(const UploadTask& task);
  void download_directly(const DownloadTask& task);
  void wait_for_writes(const Region* region);
  void check_disk_input(const Region* region, std::size_t bytes) const;
  void settle_disk(std::unique_lock<std::mutex>& lock);

  void fail(const std::string& lane, std::exception_ptr error);
  void stop();

  // scheduler.cpp
  void throw_if_failed() const;
  void check_chunk(std::uint32_t chunk) const;
  void check_place(const ChunkSpec& spec, const void* weight, const Region* on_disk) const;
  void check_gradient(std::uint32_t chunk, std::size_t bytes, bool for_sink) const;
  Ticket download(DownloadTask task, StreamHandle stream);
  Ticket fetch(UploadTask task, StreamHandle stream);
  void expect_update(std::uint32_t chunk);
  void await_slot(const Slot& slot, Hold& hold, std::uint32_t chunk, StreamHandle stream,
                  std::unique_lock<std::mutex>& lock);
  template <class Predicate>
  void wait_for(std::unique_lock<std::mutex>& lock, Predicate predicate) {
    changed.wait(lock, [&] { return failure != nullptr || stopping || predicate(); });
    throw_if_failed();
  }

  // tickets.cpp; all need the mutex
  Ticket new_ticket();
  void issue_ticket(Ticket ticket, StreamHandle stream);
  bool ticket_issued(Ticket ticket) const;
  void check_ticket(Ticket ticket) const;
  std::shared_ptr<const EventHandle> ticket_event(Ticket ticket) const;  // of an issued one; null: already done
  void retire_tickets();

  const std::shared_ptr<Device> device;
  const std::shared_ptr<GradientSink> sink;
  const SchedulerOptions options;
  const pid_t owner = getpid();

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Chunk> chunks;
  std::vector<Window> windows;
  std::vector<Visit> schedule;
  std::size_t position = 0;  // index of the visit expected next
  std::uint64_t next_upload = 1;

  std::deque<UploadTask> uploads;
  std::deque<DownloadTask> downloads;
  std::deque<UpdateTask> updates;
  std::deque<HostUpdate> host_updates;
  std::size_t from_host = 0;  // of `updates`, those whose gradient is in the caller's memory
  // The disk lane: how many staged pieces were consumed, and how many it had been when there was no room for another.
  std::uint64_t unstaged = 0, full_at = kNever;
  int upload_busy = 0, download_busy = 0, update_busy = 0, disk_busy = 0;

  Trace trace;
  EventPool events;

  // Events of the tickets first_ticket, first_ticket + 1, ...; null: not on a stream yet.
  std::deque<std::shared_ptr<const EventHandle>> tickets;
  Ticket first_ticket = 1;

  DeviceSpans spans;
  std::unique_ptr<Ring> ring;
  // The upload lane's own: pinned pieces that what is on disk passes through, and the copy that may still read each.
  std::unique_ptr<HostBuffer> disk_pieces;
  std::vector<EventHandle> disk_piece_read;
  // The download lane's own: pieces for inputs on their way to disk (made at the first), and the write of each.
  std::unique_ptr<HostBuffer> input_pieces;
  std::vector<Ticket> input_piece_written;
  std::map<const Region*, std::vector<Ticket>> input_writes;  // of each region, until waited for; guarded by the mutex
  StreamHandle upload_stream = 0, download_stream = 0;
  Counters counters{};

  std::exception_ptr failure;  // set once, by the lane that failed first
  bool stopping = false;
  std::vector<std::thread> threads;
};

}  // namespace slidecore
