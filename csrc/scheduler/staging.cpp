#include "scheduler/staging.h"

#include <algorithm>
#include <string>
#include <utility>

#include "slidecore/status.h"

namespace slidecore {
namespace {

// Parts begin on a page of their own: direct transfers then need no copy.
constexpr std::size_t kPage = 4096;

std::size_t checked_stages(std::size_t stages) {
  // One is read or written while the other is updated.
  if (stages < 2) throw Error(Code::invalid_argument, "staging needs at least 2 stages");
  return stages;
}

}  // namespace

std::size_t Staging::padded(std::size_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}

Staging::Staging(std::shared_ptr<Transfers> transfers, std::shared_ptr<Device> device, std::size_t stages,
                 std::size_t stage_bytes)
    : transfers_(std::move(transfers)),
      stage_bytes_(padded(stage_bytes)),
      buffer_(std::move(device), checked_stages(stages) * stage_bytes_, /*pinned=*/false),
      stages_(stages) {
  for (std::size_t i = 0; i < stages; ++i) stages_[i].memory = static_cast<char*>(buffer_.data()) + i * stage_bytes_;
  // Only spares the kernel work; where it is refused, transfers go without.
  if (buffer_.size() > 0) transfers_->register_memory(buffer_.data(), buffer_.size());
}

Staging::~Staging() {
  try {
    transfers_->synchronize();  // they use the stages
  } catch (const Error&) {
    // They have failed or are closed: nothing is under way any more.
  }
  try {
    if (buffer_.size() > 0) transfers_->unregister_memory(buffer_.data());
  } catch (const Error&) {
    // The registration goes with the transfers.
  }
}

void Staging::wait(const std::vector<Ticket>& tickets) {
  for (const Ticket ticket : tickets) transfers_->wait(ticket);
}

// Of the update before, as an update's own pieces do not overlap.
std::vector<Ticket> Staging::writes_to(const std::vector<StagedPart>& parts) {
  const std::lock_guard lock(mutex_);
  std::vector<Ticket> writes;
  for (const Stage& stage : stages_) {
    if (stage.state != State::writing) continue;
    const bool overlap = std::any_of(stage.parts.begin(), stage.parts.end(), [&](const StagedPart& old) {
      return std::any_of(parts.begin(), parts.end(), [&](const StagedPart& part) {
        return part.region == old.region && part.offset < old.offset + old.bytes &&
               old.offset < part.offset + part.bytes;
      });
    });
    if (overlap) writes.insert(writes.end(), stage.tickets.begin(), stage.tickets.end());
  }
  return writes;
}

bool Staging::begin(std::uint32_t chunk, std::uint64_t piece, const std::vector<StagedPart>& parts) {
  std::size_t needed = 0;
  for (const StagedPart& part : parts) needed += padded(part.bytes);
  if (needed > stage_bytes_) {
    throw Error(Code::invalid_argument, "a piece of " + std::to_string(needed) + " bytes does not fit in a stage of " +
                                            std::to_string(stage_bytes_));
  }
  wait(writes_to(parts));
  std::unique_lock lock(mutex_);
  auto stage = std::find_if(stages_.begin(), stages_.end(), [](const Stage& s) { return s.state == State::free; });
  if (stage == stages_.end()) {
    // The oldest: its writes end first.
    stage = std::find_if(stages_.begin(), stages_.end(), [](const Stage& s) { return s.state == State::writing; });
    if (stage == stages_.end()) return false;
    const std::vector<Ticket> writes = stage->tickets;
    lock.unlock();
    wait(writes);
    lock.lock();
  }
  Stage taken = std::move(*stage);
  stages_.erase(stage);
  taken.state = State::free;
  taken.chunk = chunk;
  taken.piece = piece;
  taken.parts = parts;
  taken.tickets.clear();
  stages_.push_back(std::move(taken));
  Stage& newest = stages_.back();
  char* memory = newest.memory;
  for (const StagedPart& part : parts) {
    newest.tickets.push_back(transfers_->read(part.region, part.offset, memory, part.bytes));
    memory += padded(part.bytes);
  }
  newest.state = State::held;
  return true;
}

std::vector<Staging::Stage>::iterator Staging::find_held(std::uint32_t chunk, std::uint64_t piece) {
  return std::find_if(stages_.begin(), stages_.end(),
                      [&](const Stage& s) { return s.state == State::held && s.chunk == chunk && s.piece == piece; });
}

Staging::Stage& Staging::held(std::uint32_t chunk, std::uint64_t piece) {
  const auto found = find_held(chunk, piece);
  if (found == stages_.end()) {
    throw Error(Code::state, "piece " + std::to_string(piece) + " of chunk " + std::to_string(chunk) +
                                 " lies on disk and was not staged before its update");
  }
  return *found;
}

bool Staging::ready(std::uint32_t chunk, std::uint64_t piece) {
  const std::lock_guard lock(mutex_);
  const auto found = find_held(chunk, piece);
  if (found == stages_.end()) return true;
  const std::vector<Ticket>& reads = found->tickets;
  return std::all_of(reads.begin(), reads.end(), [&](Ticket ticket) { return transfers_->done(ticket); });
}

std::vector<char*> Staging::parts(std::uint32_t chunk, std::uint64_t piece) {
  std::unique_lock lock(mutex_);
  const Stage& stage = held(chunk, piece);
  std::vector<char*> places;
  char* memory = stage.memory;
  for (const StagedPart& part : stage.parts) {
    places.push_back(memory);
    memory += padded(part.bytes);
  }
  const std::vector<Ticket> reads = stage.tickets;
  lock.unlock();
  wait(reads);
  return places;
}

void Staging::finish(std::uint32_t chunk, std::uint64_t piece) {
  const std::lock_guard lock(mutex_);
  Stage& stage = held(chunk, piece);
  stage.tickets.clear();
  char* memory = stage.memory;
  for (const StagedPart& part : stage.parts) {
    stage.tickets.push_back(transfers_->write(part.region, part.offset, memory, part.bytes));
    memory += padded(part.bytes);
  }
  stage.state = State::writing;
}

void Staging::settle(std::uint32_t chunk) {
  std::vector<Ticket> writes;
  {
    const std::lock_guard lock(mutex_);
    for (const Stage& stage : stages_) {
      if (stage.state != State::writing || stage.chunk != chunk) continue;
      writes.insert(writes.end(), stage.tickets.begin(), stage.tickets.end());
    }
  }
  wait(writes);
  // Regions that nobody else uses any more go.
  const std::lock_guard lock(mutex_);
  for (Stage& stage : stages_) {
    if (stage.state != State::writing || stage.chunk != chunk) continue;
    const bool done = std::all_of(stage.tickets.begin(), stage.tickets.end(),
                                  [&](Ticket ticket) { return transfers_->done(ticket); });
    if (!done) continue;
    stage.state = State::free;
    stage.parts.clear();
    stage.tickets.clear();
  }
}

}  // namespace slidecore
