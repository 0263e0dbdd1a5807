#include "io/piece.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "io/errors.h"
#include "slidecore/status.h"

namespace slidecore::io {
namespace {

constexpr std::chrono::microseconds kFirstDelay{50}, kLongestDelay{10'000};
constexpr const char* kTruncated = "the file ends there: something has truncated it";

}  // namespace

std::vector<Piece> split(const Storage::Impl& storage, const Region& region, bool write, std::uint64_t offset,
                         char* memory, std::size_t bytes, std::size_t block_bytes) {
  std::vector<Piece> pieces;
  const std::uint64_t unit = storage.unit, end = offset + bytes;
  for (std::uint64_t at = offset; at < end;) {
    const Storage::Impl::Place place = storage.place(region.base() + at);
    Piece piece;
    piece.drive = place.drive;
    piece.offset = place.offset;
    piece.memory = memory + (at - offset);
    piece.region_offset = at;
    const std::uint64_t head = at % unit;  // regions begin at a multiple of the unit
    if (head != 0 || end - at < unit) {
      piece.bytes = std::min(unit - head, end - at);
      piece.bounced = true;
      // Behind the region's end is padding, which nobody reads.
      piece.merged = write && (head != 0 || at + piece.bytes != region.size());
    } else {
      piece.bytes = std::min({static_cast<std::uint64_t>(block_bytes), place.bytes, (end - at) / unit * unit});
      piece.bounced = reinterpret_cast<std::uintptr_t>(piece.memory) % storage.memory_alignment != 0;
    }
    at += piece.bytes;
    pieces.push_back(piece);
  }
  return pieces;
}

void Bounce::Unmap::operator()(char* data) const {
  ::munmap(data, bytes);
}

char* Bounce::make(std::size_t bytes) {
  char* data = nullptr;
  if (bytes <= kAssumedAlignment) {
    if (page_ == nullptr) page_.reset(static_cast<char*>(std::aligned_alloc(kAssumedAlignment, kAssumedAlignment)));
    data = page_.get();
  } else {
    mapped_.reset();
    void* const mapped =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (mapped != MAP_FAILED) mapped_ = {static_cast<char*>(mapped), Unmap{bytes}};
    data = mapped_.get();
  }
  if (data == nullptr) throw Error(Code::out_of_memory, "no memory for a bounce buffer of " + size_text(bytes));
  return data;
}

Execution::Execution(const Storage::Impl& storage, double patience_s)
    : storage_(storage),
      patience_(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(patience_s))) {}

void Execution::begin(const Piece& piece) {
  piece_ = piece;
  const std::size_t unit = storage_.unit, head = piece.offset % unit;
  begin_ = piece.offset - head;
  span_ = (head + piece.bytes + unit - 1) / unit * unit;
  writing_ = piece.transfer->write && !piece.merged;
  if (piece.transfer->write && !piece.transfer->looked.exchange(true)) {
    storage_.check_files(true, *piece.transfer->region);
  }
  memory_ = piece.bounced ? bounce_.make(span_) : piece.memory;
  if (piece.bounced) {
    bounced_bytes += piece.bytes;
    if (writing_) {  // not merged: begins at a unit
      std::memcpy(memory_, piece.memory, piece.bytes);
      std::memset(memory_ + piece.bytes, 0, span_ - piece.bytes);
    }
  }
  done_ = 0;
  progress();
}

void Execution::progress() {
  last_progress_ = Clock::now();
  delay_ = std::chrono::microseconds{0};
}

Request Execution::request() const {
  return {writing_, begin_ + done_, span_ - done_, memory_ + done_};
}

Execution::Next Execution::complete(long result) {
  ++requests;
  if (result == -EINTR || result == -EAGAIN) {
    ++retries;
    if (!patient()) fail(errno_text(result) + ", again and again");
    // An interrupted call is simply made again; a busy drive is left alone for longer and longer.
    if (result == -EINTR && delay_.count() == 0) return Next::request;
    delay_ = std::clamp(delay_ * 2, kFirstDelay, kLongestDelay);
    return Next::request_later;
  }
  if (result < 0) fail(errno_text(result));
  if (static_cast<std::size_t>(result) > span_ - done_) fail("the kernel moved more than it was asked to");
  if (result == 0 && !writing_) fail(kTruncated);
  const std::size_t before = done_;
  done_ += static_cast<std::size_t>(result);
  if (done_ < span_) {
    ++short_transfers;
    done_ -= done_ % storage_.unit;  // direct transfers go on at a multiple
    if (done_ > before) {
      progress();
      return Next::request;
    }
    if (!writing_) check_length(static_cast<std::size_t>(result));
    if (!patient()) fail("only " + std::to_string(result) + " bytes were moved, again and again");
    delay_ = std::clamp(delay_ * 2, kFirstDelay, kLongestDelay);
    return Next::request_later;
  }
  if (writing_) {
    bounce_.free();
    return Next::done;
  }
  char* wanted = memory_ + piece_.offset % storage_.unit;
  if (piece_.merged) {
    std::memcpy(wanted, piece_.memory, piece_.bytes);
    writing_ = true;
    done_ = 0;
    progress();
    return Next::request;
  }
  if (piece_.bounced) std::memcpy(piece_.memory, wanted, piece_.bytes);
  bounce_.free();
  if (piece_.transfer->unread.fetch_sub(1) == 1) storage_.check_files(false, *piece_.transfer->region);
  return Next::done;
}

// A read of less than a block says that the file ends inside of it, or nothing.
void Execution::check_length(std::size_t moved) const {
  FileStatus status{};
  const int code = storage_.calls->status(storage_.files[piece_.drive]->fd(), &status);
  if (code >= 0 && status.size <= begin_ + done_ + moved) fail(kTruncated);
}

void Execution::fail(const std::string& reason) const {
  const std::uint64_t end = piece_.region_offset + piece_.bytes;
  throw Error(Code::io, std::string(writing_ ? "writing" : "reading") + " " + std::to_string(span_ - done_) +
                            " bytes at offset " + std::to_string(begin_ + done_) + " of " +
                            storage_.paths[piece_.drive] + " failed: " + reason + " (bytes " +
                            std::to_string(piece_.region_offset) + " to " + std::to_string(end) + " of '" +
                            piece_.transfer->region->name() + "')");
}

}  // namespace slidecore::io
