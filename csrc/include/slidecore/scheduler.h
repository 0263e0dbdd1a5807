#pragma once
// The scheduler: lanes that move chunks through windows of device slots while compute goes on.
//
//   Scheduler s(device, chunks, windows, sink, options);
//   s.set_schedule(visits);                                // the cyclic list of visits of one step
//   void* weights = s.acquire(chunk, Phase::forward, stream); // `stream` waits until the weights are there
//   ... enqueue the visit's work on `stream` ...
//   s.release(chunk, Phase::forward, stream);               // what follows is prefetched behind that work
//
// In backward, submit_gradient() hands over a device buffer that the visit's work on `stream` fills; its pieces
// go down through a pinned ring to the GradientSink, which updates the host plane the weights are uploaded from.
// Updates that come later than their backward keep gradients in host memory: save_gradient() puts one there as it is,
// add_gradient() lets the sink add it to a sum, and update() gives the sink what is there.
//
// Hazards, each an explicit dependency:
//   upload into a slot      waits for the last visit's work in that slot          (event, on the upload stream)
//   upload of a chunk       waits for that chunk's submitted updates              (upload lane)
//   a visit                 waits for its upload                                  (event, on the compute stream)
//   download of a gradient  waits for the visit's work                            (event, on the download stream)
//   an update               waits for uploads that still read the chunk's plane   (update lane)
//   an update               waits for the chunk's updates before it               (update lane)
//   a piece's update        waits for what of its planes lies on disk             (update lane, after the disk lane)
//   a read from disk        waits for earlier writes of the same bytes            (disk lane, upload lane)
//   an update from the host waits for its gradient's transfer, or for the chunk's sums (update lane)
//   a sum                   waits for the chunk's updates, which may still read the one before it (update lane)
//   a saved gradient        waits for the chunk's updates and sums, which may still use the one before it (download
//   lane) a download's piece      waits for a free piece of the ring                    (download lane: backpressure)
// Updates depend on downloads, downloads on compute and on earlier updates, compute on uploads, uploads on
// earlier updates and visits: the order is that of the calls, so there is no cycle.
//
// All methods are thread-safe. An error on a lane stops all lanes and is thrown by the next call (and by every
// later one). The destructor stops and joins every thread; it drops queued work, so call synchronize() first. In a
// child of fork(), which must not use it otherwise, it does nothing.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "slidecore/device.h"
#include "slidecore/gpu_direct.h"
#include "slidecore/io.h"
#include "slidecore/memory.h"
#include "slidecore/trace.h"

namespace slidecore {

enum class Phase : std::uint8_t { forward, backward };

struct Visit {
  std::uint32_t chunk;
  Phase phase;
  bool weights = true;   // the visit reads the chunk's weights (an embedding's backward does not)
  bool updates = false;  // a gradient is submitted after this visit: later visits need the new weights
};

struct ChunkSpec {
  std::string name;
  const void* weight;  // host plane (pinned, where the device needs it); outlives the scheduler. Null: see `on_disk`
  std::size_t weight_bytes;
  std::uint32_t window;                             // which window's slots it visits
  std::shared_ptr<const Region> on_disk = nullptr;  // the plane, in the place of `weight`
};

struct WindowSpec {
  std::vector<void*> slots;  // device buffers, owned by the caller, outliving the scheduler
  std::size_t slot_bytes;
};

// Consumes gradients on the update lane. Calls for one submission come in order: begin, consume..., end; between them
// may come calls for other chunks, whose weights are needed sooner.
class GradientSink {
 public:
  virtual ~GradientSink() = default;
  virtual void begin(std::uint32_t chunk) = 0;
  virtual void consume(std::uint32_t chunk, std::size_t offset_bytes, const void* piece, std::size_t bytes) = 0;
  virtual void end(std::uint32_t chunk) = 0;

  // For a sink with state on disk. The disk lane calls stage() for each piece of an update of a chunk that needs it,
  // before the piece is consumed: it begins to read what that takes, and may wait for what was written before. False:
  // there is no room until another piece has been consumed. staged(): all is there, consume() need not wait. settle()
  // returns when all that the chunk's finished updates have written is on disk. Any thread may call these.
  virtual bool needs_stage(std::uint32_t /*chunk*/) { return false; }
  virtual bool stage(std::uint32_t /*chunk*/, std::size_t /*offset_bytes*/, std::size_t /*bytes*/) { return true; }
  virtual bool staged(std::uint32_t /*chunk*/, std::size_t /*offset_bytes*/) { return true; }
  virtual void settle(std::uint32_t /*chunk*/) {}
};

struct SchedulerOptions {
  std::size_t piece_bytes = std::size_t{16} << 20;  // 4 to 32 MiB suit; a multiple of 4096
  // At least 2. More let updates fall behind: they go on in the next forward, in the order of need.
  std::size_t ring_pieces = 8;
  std::size_t trace_spans = std::size_t{1} << 16;
  // The disk tier's, if there is one. What lies on disk is uploaded through `disk_pieces` pinned pieces, and as many
  // take what is saved there.
  std::shared_ptr<Transfers> transfers = nullptr;
  std::size_t disk_pieces = 4;
  // Of the same files: what is saved on disk goes there from device memory and back, past the pieces, and the lanes
  // wait for it. The upload lane begins a read once the work it comes after is done. Null: through the pieces.
  std::shared_ptr<GpuDirect> gpu_direct = nullptr;
};

class Scheduler {
 public:
  // `sink` may be null: submit_gradient() is then an error. Throws Error(invalid_argument) for a chunk larger than
  // its window's slots, an unknown window, or a window without slots.
  Scheduler(std::shared_ptr<Device> device, std::vector<ChunkSpec> chunks, std::vector<WindowSpec> windows,
            std::shared_ptr<GradientSink> sink, SchedulerOptions options = {});
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Replaces the schedule; the next visit is expected to be its first. Prefetch of its first visits starts now.
  void set_schedule(std::vector<Visit> visits);

  // Returns the slot (device address) that holds the chunk's weights for work enqueued on `stream` from now on.
  // Nested acquires of the same chunk share the slot. A visit the schedule did not foresee is served on demand.
  // Throws Error(state) if every slot of the window is held.
  void* acquire(std::uint32_t chunk, Phase phase, StreamHandle stream);
  // Ends the calling thread's innermost visit of the chunk, or, if it has none, the innermost of all.
  void release(std::uint32_t chunk, Phase phase, StreamHandle stream);

  // The gradient at `gradient` is complete once work enqueued on `stream` so far has run. The buffer must stay
  // untouched until the ticket is done. The chunk's slot copies are stale from now on.
  Ticket submit_gradient(std::uint32_t chunk, const void* gradient, std::size_t bytes, StreamHandle stream);

  // As submit_gradient(), for a gradient that the sink only adds to a sum: the weights stay as they are.
  Ticket add_gradient(std::uint32_t chunk, const void* gradient, std::size_t bytes, StreamHandle stream);

  // The gradient goes to `host` as it is, on the download lane; the sink sees nothing of it.
  Ticket save_gradient(std::uint32_t chunk, void* host, const void* gradient, std::size_t bytes, StreamHandle stream);

  // The sink consumes a gradient in host memory on the update lane, in pieces, once `after` is done (0: at once) and
  // the chunk's gradients that were handed to add_gradient() have been added. `gradient` must stay untouched until the
  // update is (wait_updates()). The chunk's slot copies are stale from now on.
  void update(std::uint32_t chunk, const void* gradient, std::size_t bytes, Ticket after);

  // Saved inputs: device -> host on the download lane, host -> device on the upload lane, each after the work
  // enqueued on `stream` so far (and `after`, if not 0).
  Ticket save_input(std::int32_t chunk, void* host, const void* device, std::size_t bytes, StreamHandle stream);
  Ticket fetch_input(std::int32_t chunk, void* device, const void* host, std::size_t bytes, StreamHandle stream,
                     Ticket after = 0);

  // The same to and from disk, through pinned pieces (SchedulerOptions::transfers) or past them (gpu_direct). The
  // device memory that is saved may be used again after the ticket as above; what is fetched with `after` has been
  // written by then.
  Ticket save_input(std::int32_t chunk, std::shared_ptr<const Region> on_disk, const void* device, std::size_t bytes,
                    StreamHandle stream);
  Ticket fetch_input(std::int32_t chunk, void* device, std::shared_ptr<const Region> on_disk, std::size_t bytes,
                     StreamHandle stream, Ticket after = 0);

  bool done(Ticket ticket);                       // the transfer has completed
  void wait(Ticket ticket, StreamHandle stream);  // `stream` waits for the transfer; blocks only until it is enqueued
  void synchronize_ticket(Ticket ticket);         // the calling thread waits for the transfer

  // The chunk's weights lie elsewhere from now on, with the same content: in memory, or if `weight` is null, on disk.
  // To be called after synchronize(), with no visit of the chunk under way. Throws Error(invalid_argument) for a region
  // that is too small, or where there are no transfers.
  void place_weight(std::uint32_t chunk, const void* weight, std::shared_ptr<const Region> on_disk);

  // The chunk's host plane was changed by the caller (after synchronize()): slot copies are stale.
  void invalidate(std::uint32_t chunk);
  void wait_updates();  // until every submitted gradient has been consumed, and every update() is done
  void synchronize();   // until every lane is idle
  void check();         // throws the stored error of a lane, if any

  Trace& trace();
  void start_trace();  // synchronizes, then enables the trace and aligns the device's clock with the host's
  void stop_trace();   // synchronizes, then disables it; spans stay readable
  std::string chrome_trace();

  struct Counters {
    std::uint64_t uploads, upload_bytes, gradients, gradient_bytes, unscheduled_visits, visits, hits;
  };
  Counters counters() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slidecore
