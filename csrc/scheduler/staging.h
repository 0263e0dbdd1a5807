#pragma once
// Where pieces of planes that lie on disk pass through host memory: read ahead of their update, written behind it.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "slidecore/io.h"
#include "slidecore/memory.h"

namespace slidecore {

// A range of a plane on disk: bytes [offset, offset + bytes) of the region.
struct StagedPart {
  std::shared_ptr<const Region> region;
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
};

// A fixed number of stages, each with room for one piece's parts. A stage is free, then holds what is being read, until
// the piece was updated; then it is written, and free once it is on disk. begin() is the disk lane's alone, parts() and
// finish() the update lane's; the others may be called by anyone.
class Staging {
 public:
  // The stages are plain memory. `stage_bytes` is rounded up to whole pages.
  Staging(std::shared_ptr<Transfers> transfers, std::shared_ptr<Device> device, std::size_t stages,
          std::size_t stage_bytes);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Begins to read the parts of piece `piece` of `chunk`, which is not staged yet. Waits for writes that they follow.
  // False: every stage holds a piece that waits for its update. Throws Error(invalid_argument) if a stage is too small.
  bool begin(std::uint32_t chunk, std::uint64_t piece, const std::vector<StagedPart>& parts);
  // Whether parts() would not wait.
  bool ready(std::uint32_t chunk, std::uint64_t piece);
  // Where each part lies, once all have been read. Throws Error(state) if the piece is not staged.
  std::vector<char*> parts(std::uint32_t chunk, std::uint64_t piece);
  // Begins to write the piece back.
  void finish(std::uint32_t chunk, std::uint64_t piece);
  // Returns when everything of the chunk that was updated is on disk.
  void settle(std::uint32_t chunk);

  std::size_t bytes() const { return buffer_.size(); }

 private:
  enum class State : std::uint8_t { free, held, writing };
  struct Stage {
    char* memory = nullptr;
    State state = State::free;
    std::uint32_t chunk = 0;
    std::uint64_t piece = 0;
    std::vector<StagedPart> parts;
    std::vector<Ticket> tickets;  // of its reads, then of its writes
  };

  static std::size_t padded(std::size_t bytes);
  std::vector<Stage>::iterator find_held(std::uint32_t chunk, std::uint64_t piece);
  Stage& held(std::uint32_t chunk, std::uint64_t piece);
  void wait(const std::vector<Ticket>& tickets);
  std::vector<Ticket> writes_to(const std::vector<StagedPart>& parts);

  const std::shared_ptr<Transfers> transfers_;
  const std::size_t stage_bytes_;
  HostBuffer buffer_;
  std::mutex mutex_;
  std::vector<Stage> stages_;  // oldest use first
};

}  // namespace slidecore
