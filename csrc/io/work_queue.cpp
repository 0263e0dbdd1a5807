#include "io/work_queue.h"

#include <algorithm>
#include <string>
#include <utility>

#include "slidecore/status.h"

namespace slidecore::io {

void WorkQueue::throw_if_failed() const {
  if (failure_ != nullptr) std::rethrow_exception(failure_);
  if (stopping_) throw Error(Code::state, "the transfers are closed");
}

void WorkQueue::check_ticket(Ticket ticket) const {
  if (ticket >= next_ticket_) {
    throw Error(Code::invalid_argument, "ticket " + std::to_string(ticket) + " was never given");
  }
}

Ticket WorkQueue::push(std::unique_ptr<Transfer> transfer, std::vector<Piece> pieces) {
  const std::lock_guard lock(mutex_);
  throw_if_failed();
  if (failing_ != nullptr) return next_ticket_++;  // the error comes with the next call after it has settled
  const Ticket ticket = next_ticket_;
  transfer->ticket = ticket;
  transfer->pieces_left = pieces.size();
  for (Piece& piece : pieces) {
    piece.transfer = transfer.get();
    drives_[piece.drive].of(transfer->write).waiting.push_back(piece);
  }
  transfers_.emplace(ticket, std::move(transfer));
  ++next_ticket_;
  work_.notify_all();
  wake_locked();
  return ticket;
}

bool WorkQueue::done(Ticket ticket) {
  const std::lock_guard lock(mutex_);
  throw_if_failed();
  check_ticket(ticket);
  return failing_ == nullptr && !transfers_.contains(ticket);
}

void WorkQueue::wait(Ticket ticket) {
  std::unique_lock lock(mutex_);
  throw_if_failed();
  check_ticket(ticket);
  changed_.wait(
      lock, [&] { return failure_ != nullptr || stopping_ || (failing_ == nullptr && !transfers_.contains(ticket)); });
  throw_if_failed();
}

void WorkQueue::synchronize() {
  std::unique_lock lock(mutex_);
  throw_if_failed();
  const Ticket end = next_ticket_;
  changed_.wait(lock, [&] {
    const bool idle = transfers_.empty() || transfers_.begin()->first >= end;
    return failure_ != nullptr || stopping_ || (failing_ == nullptr && idle);
  });
  throw_if_failed();
}

void WorkQueue::check() {
  const std::lock_guard lock(mutex_);
  throw_if_failed();
}

void WorkQueue::stop() {
  const std::lock_guard lock(mutex_);
  stopping_ = true;
  drop_waiting();
  work_.notify_all();
  changed_.notify_all();
  wake_locked();
}

Transfers::Counters WorkQueue::counters() const {
  const std::lock_guard lock(mutex_);
  return counters_;
}

void WorkQueue::drop_waiting() {
  for (Drive& drive : drives_) {
    drive.reads.waiting.clear();
    drive.writes.waiting.clear();
  }
}

std::optional<Piece> WorkQueue::next(std::uint32_t number) {
  // In order of arrival a burst of reads would be followed by a burst of writes, and so on: whoever reads, works and
  // writes in a few buffers falls into that step. Most drives do more with both under way.
  Drive& drive = drives_[number];
  const std::size_t reads = drive.reads.under_way, writes = drive.writes.under_way;
  const bool write = reads == writes ? !drive.last_wrote : writes < reads;
  std::optional<Piece> piece = next(drive.of(write));
  if (!piece) piece = next(drive.of(!write));
  if (piece) drive.last_wrote = piece->transfer->write;
  return piece;
}

std::optional<Piece> WorkQueue::next(Direction& direction) {
  auto& pieces = direction.waiting;
  const auto ready = std::find_if(pieces.begin(), pieces.end(), [&](const Piece& piece) {
    return !piece.merged || !merging_.contains(block_of(piece));
  });
  if (ready == pieces.end()) return std::nullopt;
  Piece piece = *ready;
  pieces.erase(ready);
  ++direction.under_way;
  if (observer_ && !piece.transfer->began) piece.transfer->began = std::chrono::steady_clock::now();
  if (piece.merged) merging_.insert(block_of(piece));
  ++under_way_;
  return piece;
}

std::optional<Piece> WorkQueue::take(std::uint32_t drive) {
  std::unique_lock lock(mutex_);
  std::optional<Piece> piece;
  work_.wait(lock, [&] { return stopping_ || (piece = next(drive)).has_value(); });
  return piece;
}

std::optional<Piece> WorkQueue::try_take(std::uint32_t drive) {
  const std::lock_guard lock(mutex_);
  return stopping_ ? std::nullopt : next(drive);
}

void WorkQueue::returned(const Piece& piece) {
  --under_way_;
  --drives_[piece.drive].of(piece.transfer->write).under_way;
  if (!piece.merged) return;
  merging_.erase(block_of(piece));
  work_.notify_all();
}

void WorkQueue::settle() {
  if (failing_ == nullptr || under_way_ != 0) return;
  failure_ = failing_;
  transfers_.clear();
  changed_.notify_all();
}

void WorkQueue::finished(const Piece& piece, Execution& counts) {
  const std::lock_guard lock(mutex_);
  returned(piece);
  counters_.requests += std::exchange(counts.requests, 0);
  counters_.bounced_bytes += std::exchange(counts.bounced_bytes, 0);
  counters_.short_transfers += std::exchange(counts.short_transfers, 0);
  counters_.retries += std::exchange(counts.retries, 0);
  Transfer& transfer = *piece.transfer;
  if (--transfer.pieces_left == 0) {
    (transfer.write ? counters_.writes : counters_.reads) += 1;
    (transfer.write ? counters_.written_bytes : counters_.read_bytes) += transfer.bytes;
    if (observer_ && transfer.began) {
      observer_({transfer.write, transfer.bytes, *transfer.began, std::chrono::steady_clock::now()});
    }
    transfers_.erase(transfer.ticket);  // and with it the hold on its region, before anyone is told
    changed_.notify_all();
  }
  settle();
}

void WorkQueue::failed(const Piece& piece, std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  returned(piece);
  if (failing_ == nullptr) failing_ = std::move(error);
  drop_waiting();
  settle();
}

void WorkQueue::broken(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  under_way_ = 0;
  if (failing_ == nullptr) failing_ = std::move(error);
  drop_waiting();
  settle();
}

void WorkQueue::observe(std::function<void(const TransferSpan&)> observer) {
  const std::lock_guard lock(mutex_);
  observer_ = std::move(observer);
}

bool WorkQueue::stopping() const {
  const std::lock_guard lock(mutex_);
  return stopping_;
}

bool WorkQueue::abandoned() const {
  const std::lock_guard lock(mutex_);
  return stopping_ || failing_ != nullptr;
}

void WorkQueue::set_wake(std::function<void()> wake) {
  const std::lock_guard lock(mutex_);
  wake_ = std::move(wake);
}

void WorkQueue::expect_wake() {
  const std::lock_guard lock(mutex_);
  sleeping_ = true;
}

void WorkQueue::wake() {
  const std::lock_guard lock(mutex_);
  wake_locked();
}

void WorkQueue::wake_locked() {
  if (!wake_ || !sleeping_) return;
  sleeping_ = false;
  wake_();
}

}  // namespace slidecore::io
