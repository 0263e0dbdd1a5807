#pragma once
// The GradientSink that applies AdamW: what the update lane does with gradients as their pieces land.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "slidecore/device.h"
#include "slidecore/io.h"
#include "slidecore/optimizer.h"
#include "slidecore/scheduler.h"

namespace slidecore {

// Planes of a chunk on disk, each from the chunk's first element on. Null: the plane lies in memory, or there is none.
struct AdamWRegions {
  using Plane = std::shared_ptr<const Region>;
  Plane weight, residual, weight32, exp_avg, exp_avg_sq, exp_avg8, exp_avg_sq8, exp_avg_scale, exp_avg_sq_scale;
};

// Chunks are numbered as in the Scheduler it serves: by the order of add_chunk(). Each submission of a chunk's
// gradient consumes one prepared table, in the order of prepare() and prepare_sum(), so the table of step t+1 may be
// prepared while step t is still being consumed. add_chunk(), the prepare functions, squares() and discard() may be
// called while the update lane is at work.
class AdamWSink final : public GradientSink {
 public:
  // Elements [offset, offset + length) of the chunk are updated with `hyper`.
  struct Segment {
    std::size_t offset = 0;
    std::size_t length = 0;
    AdamWHyper hyper = {};
  };

  explicit AdamWSink(std::shared_ptr<ThreadPool> pool);
  ~AdamWSink() override;
  AdamWSink(const AdamWSink&) = delete;
  AdamWSink& operator=(const AdamWSink&) = delete;

  // The planes (n elements each) must outlive the sink's use of them. Returns the chunk's index.
  std::uint32_t add_chunk(const AdamWPlanes& planes, std::size_t n, GradientType type);
  // Without planes: place() gives them, before the chunk's first update.
  std::uint32_t add_chunk(std::size_t n, GradientType type);

  // From now on planes may lie on disk. Their pieces pass through `stages` stages of plain memory, each with room for
  // the planes of `stage_elements` elements of a chunk. To be called once, before place().
  void use_disk(std::shared_ptr<Transfers> transfers, std::shared_ptr<Device> device, std::size_t stages,
                std::size_t stage_elements);
  // Where the chunk's planes lie from now on: a plane that has a region is null in `planes`. The update lane must have
  // nothing to do for the chunk (Scheduler::synchronize()). Throws Error(invalid_argument) for a plane that is given
  // twice or not at all, and for a region that is too small.
  void place(std::uint32_t chunk, const AdamWPlanes& planes, const AdamWRegions& regions);
  std::size_t staging_bytes() const;  // of the stages' memory

  // Says how the chunk's next submission is applied. Segments ascend and do not overlap; with 8-bit moments each starts
  // at a multiple of moments_group, and where one ends inside a group, the rest of the group (moments and gradient)
  // must be zero, as padding is, for a group has one scale. Elements outside the segments stay as they are. Throws
  // Error(invalid_argument) otherwise, and changes nothing then.
  void prepare(std::uint32_t chunk, const std::vector<Segment>& segments);

  // As prepare(), for a gradient of another type than the chunk's.
  void prepare(std::uint32_t chunk, const std::vector<Segment>& segments, GradientType type);

  // Elements [offset, offset + length) of the chunk's gradient are added to a sum.
  struct SumSegment {
    std::size_t offset = 0;
    std::size_t length = 0;
    bool first = false;  // they are the sum: what is there is overwritten
  };

  // The chunk's next submission is added, in float32, to `sum`, which holds the chunk's elements from the first one on
  // and must outlive the submission. Refuses segments as prepare() does.
  void prepare_sum(std::uint32_t chunk, const std::vector<SumSegment>& segments, float* sum, GradientType type);

  // The sum of squares of each segment after the chunk's last submission to a sum, in double: the same for every
  // instruction set, thread count and division into pieces of whole blocks. Throws Error(state) if there was none.
  std::vector<double> squares(std::uint32_t chunk);

  // Drops what was prepared for the chunk and not begun (a step that was given up).
  void discard(std::uint32_t chunk);

  // Drops what was prepared last for the chunk: its submission was refused. Those before it stay.
  void withdraw(std::uint32_t chunk);

  // Throw Error(state) if nothing is prepared for the chunk, and Error(invalid_argument) for pieces out of their order
  // and for a submission that is not the whole gradient.
  void begin(std::uint32_t chunk) override;
  void consume(std::uint32_t chunk, std::size_t offset_bytes, const void* piece, std::size_t bytes) override;
  void end(std::uint32_t chunk) override;

  bool needs_stage(std::uint32_t chunk) override;
  bool stage(std::uint32_t chunk, std::size_t offset_bytes, std::size_t bytes) override;
  bool staged(std::uint32_t chunk, std::size_t offset_bytes) override;
  void settle(std::uint32_t chunk) override;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slidecore
