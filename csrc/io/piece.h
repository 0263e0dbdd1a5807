#pragma once
// A piece of a transfer: what one request moves, and how it gets on from result to result. Both backends share it, so
// that they differ in nothing but how requests reach the kernel.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "io/storage_impl.h"
#include "slidecore/io.h"

namespace slidecore::io {

struct Transfer {
  Ticket ticket = 0;
  std::shared_ptr<const Region> region;  // keeps its space from being given to others while requests are under way
  bool write = false;
  std::uint64_t bytes = 0;
  std::size_t pieces_left = 0;
  std::optional<std::chrono::steady_clock::time_point> began;  // set while somebody observes
  // Files are looked at once for each transfer: before it writes, and after it has read.
  std::atomic<bool> looked{false};
  std::atomic<std::size_t> unread{0};  // pieces
};

struct Piece {
  Transfer* transfer = nullptr;
  std::uint32_t drive = 0;
  std::uint64_t offset = 0;  // in the drive's file
  std::size_t bytes = 0;
  char* memory = nullptr;
  std::uint64_t region_offset = 0;
  bool bounced = false;  // goes through a buffer of ours: something is not aligned
  bool merged = false;   // a write of a part of one block, whose rest must stay: it is read first
};

// The pieces of [offset, offset + bytes) of a region, none longer than block_bytes.
std::vector<Piece> split(const Storage::Impl& storage, const Region& region, bool write, std::uint64_t offset,
                         char* memory, std::size_t bytes, std::size_t block_bytes);

// Page-aligned memory of one piece. No budget counts it, so more than a page goes back to the kernel with the piece
// (the allocator would keep it).
class Bounce {
 public:
  char* make(std::size_t bytes);
  void free() { mapped_.reset(); }

 private:
  struct Unmap {
    std::size_t bytes;
    void operator()(char* data) const;
  };
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> page_;
  std::unique_ptr<char, Unmap> mapped_;
};

struct Request {
  bool write;
  std::uint64_t offset;
  std::size_t bytes;
  char* memory;
};

// The steps of one piece. Not thread-safe; reused from piece to piece.
class Execution {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Next { request, request_later, done };

  Execution(const Storage::Impl& storage, double patience_s);
  void begin(const Piece& piece);
  const Piece& piece() const { return piece_; }
  Request request() const;
  // `result` is a number of bytes or -errno. Throws Error(io).
  Next complete(long result);
  std::chrono::microseconds delay() const { return delay_; }  // before the next request, if that is to come later

  std::uint64_t requests = 0, bounced_bytes = 0, short_transfers = 0, retries = 0;  // since they were last set to 0

 private:
  [[noreturn]] void fail(const std::string& reason) const;
  void check_length(std::size_t moved) const;
  void progress();
  bool patient() const { return Clock::now() - last_progress_ < patience_; }

  const Storage::Impl& storage_;
  Bounce bounce_;
  Clock::duration patience_;
  Piece piece_;
  bool writing_ = false;
  char* memory_ = nullptr;
  std::uint64_t begin_ = 0;  // aligned
  std::size_t span_ = 0;     // aligned, what the requests cover
  std::size_t done_ = 0;     // of it
  Clock::time_point last_progress_;
  std::chrono::microseconds delay_{0};
};

}  // namespace slidecore::io
