#pragma once
// Pieces that wait for their drive, and the tickets of the transfers that they belong to. One mutex guards all of it.

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "io/piece.h"
#include "slidecore/io.h"

namespace slidecore::io {

// A failure is thrown only once nothing is under way any more: until then memory may still be written into.
class WorkQueue {
 public:
  WorkQueue(std::size_t drives, std::size_t unit) : unit_(unit), drives_(drives) {}

  // For callers of Transfers.
  Ticket push(std::unique_ptr<Transfer> transfer, std::vector<Piece> pieces);
  bool done(Ticket ticket);
  void wait(Ticket ticket);
  void synchronize();
  void check();
  void stop();  // drops what is waiting; take() ends
  Transfers::Counters counters() const;

  // For backends. What was taken is given back by finished() or failed(), once each.
  std::optional<Piece> take(std::uint32_t drive);      // blocks; none: stopped
  std::optional<Piece> try_take(std::uint32_t drive);  // none: nothing that can go now
  void finished(const Piece& piece, Execution& counts);
  void failed(const Piece& piece, std::exception_ptr error);
  void broken(std::exception_ptr error);  // the backend itself; pieces that it has taken are counted as returned
  void observe(std::function<void(const TransferSpan&)> observer);
  bool stopping() const;
  bool abandoned() const;  // stopping or failing: what is not in the kernel's hands may be given up
  // `wake` is called, once after each expect_wake(), when work has come or ended since then. A backend that looks for
  // work after expect_wake() and finds none may sleep.
  void set_wake(std::function<void()> wake);
  void expect_wake();
  void wake();

 private:
  using Block = std::pair<std::uint32_t, std::uint64_t>;  // drive, number of the block

  struct Direction {
    std::deque<Piece> waiting;
    std::size_t under_way = 0;
  };
  struct Drive {
    Direction& of(bool write) { return write ? writes : reads; }
    Direction reads, writes;
    bool last_wrote = true;  // what was taken last
  };

  std::optional<Piece> next(std::uint32_t drive);
  std::optional<Piece> next(Direction& direction);
  void drop_waiting();
  void returned(const Piece& piece);
  void settle();
  void throw_if_failed() const;
  void check_ticket(Ticket ticket) const;
  void wake_locked();

  Block block_of(const Piece& piece) const { return {piece.drive, piece.offset / unit_}; }

  const std::size_t unit_;
  mutable std::mutex mutex_;
  std::condition_variable work_, changed_;
  std::vector<Drive> drives_;
  std::set<Block> merging_;  // blocks that are being read, changed and written
  std::map<Ticket, std::unique_ptr<Transfer>> transfers_;
  Ticket next_ticket_ = 1;
  std::size_t under_way_ = 0;
  Transfers::Counters counters_{};
  std::function<void()> wake_;
  std::function<void(const TransferSpan&)> observer_;
  bool sleeping_ = false;
  bool stopping_ = false;
  std::exception_ptr failing_, failure_;  // the second is the first, once nothing is under way
};

}  // namespace slidecore::io
