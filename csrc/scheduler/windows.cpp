// Which chunk is in which slot. The schedule is known, so the slot to give up is the one whose chunk is needed
// furthest in the future (Belady, 1966), and what comes next is uploaded as soon as a slot is free.

#include "scheduler/scheduler_impl.h"

namespace slidecore {

// Moves to the visit that is being made. A repeat of the visit just made leaves the position; a visit that is not
// in the schedule leaves it too.
void Scheduler::Impl::set_position(std::uint32_t chunk, Phase phase) {
  const std::size_t n = schedule.size();
  auto matches = [&](std::size_t i) { return schedule[i].chunk == chunk && schedule[i].phase == phase; };
  bool skipped = false;
  for (std::size_t k = 0; k < n; ++k) {
    const std::size_t i = (position + k) % n;
    if (matches(i) && schedule[i].weights) {
      if (skipped && matches((position + n - 1) % n)) break;
      for (std::size_t j = 0; j <= k; ++j) {
        const Visit& passed = schedule[(position + j) % n];
        // After a jump, what was jumped over did not take place: its gradient will not come.
        if (passed.updates && (j == k || !skipped)) chunks[passed.chunk].update_due = true;
      }
      position = (i + 1) % n;
      if (phase == Phase::forward) chunks[chunk].update_due = false;
      if (skipped) ++counters.unscheduled_visits;
      return;
    }
    skipped = skipped || schedule[i].weights;
  }
  ++counters.unscheduled_visits;
}

// The gradient of `chunk` has come: visits without weights that only stood for it are behind us.
void Scheduler::Impl::pass_update(std::uint32_t chunk) {
  chunks[chunk].update_due = false;
  const std::size_t n = schedule.size();
  for (std::size_t k = 0; k < n; ++k) {
    const Visit& visit = schedule[(position + k) % n];
    if (visit.weights) return;
    if (visit.chunk == chunk && visit.updates) {
      position = (position + k + 1) % n;
      return;
    }
  }
}

std::size_t Scheduler::Impl::next_use(std::int32_t chunk) const {
  const std::size_t n = schedule.size();
  for (std::size_t k = 0; k < n; ++k) {
    const Visit& visit = schedule[(position + k) % n];
    if (visit.weights && static_cast<std::int32_t>(visit.chunk) == chunk) return k;
  }
  return n;
}

std::int32_t Scheduler::Impl::victim(const Window& window, const std::vector<bool>& keep) const {
  std::int32_t best = -1;
  std::size_t best_use = 0;
  for (std::size_t s = 0; s < window.slots.size(); ++s) {
    const Slot& slot = window.slots[s];
    if (slot.pins > 0 || keep[s]) continue;
    // An empty slot comes before every occupied one.
    const std::size_t use = slot.occupant < 0 ? schedule.size() + 1 : next_use(slot.occupant);
    if (best < 0 || use > best_use) {
      best = static_cast<std::int32_t>(s);
      best_use = use;
    }
  }
  return best;
}

void Scheduler::Impl::assign(std::uint32_t chunk, std::uint32_t s) {
  Chunk& c = chunks[chunk];
  Slot& slot = windows[c.spec.window].slots[s];
  if (slot.occupant >= 0) chunks[slot.occupant].slot = -1;
  slot.occupant = static_cast<std::int32_t>(chunk);
  slot.upload = next_upload++;
  slot.issued = false;
  c.slot = static_cast<std::int32_t>(s);
  UploadTask task{};
  task.is_weights = true;
  task.window = c.spec.window;
  task.slot = s;
  task.upload = slot.upload;
  task.chunk = static_cast<std::int32_t>(chunk);
  uploads.push_back(task);
  changed.notify_all();
}

void Scheduler::Impl::prefetch() {
  const std::size_t n = schedule.size();
  if (n == 0 || failure != nullptr) return;
  std::vector<std::vector<bool>> keep;
  std::vector<std::size_t> open;  // slots of each window that no coming visit has claimed yet
  for (const Window& window : windows) {
    keep.emplace_back(window.slots.size(), false);
    std::size_t unpinned = 0;
    for (const Slot& slot : window.slots) unpinned += slot.pins == 0;
    open.push_back(unpinned);
  }
  std::vector<bool> due(chunks.size());
  for (std::size_t c = 0; c < chunks.size(); ++c) due[c] = chunks[c].update_due;
  std::vector<bool> reserved(chunks.size(), false);
  for (std::size_t k = 0; k < n; ++k) {
    const Visit& visit = schedule[(position + k) % n];
    Chunk& chunk = chunks[visit.chunk];
    const std::uint32_t w = chunk.spec.window;
    if (visit.weights && open[w] > 0) {
      if (chunk.slot >= 0) {
        if (!keep[w][chunk.slot] && windows[w].slots[chunk.slot].pins == 0) {
          keep[w][chunk.slot] = true;
          --open[w];
        }
      } else if (due[visit.chunk] && visit.phase == Phase::forward) {
        // Weights that are about to change are not worth an upload, but a slot is kept for them: given to a chunk
        // that is needed later, it would be taken away again before that.
        if (!reserved[visit.chunk]) --open[w];
        reserved[visit.chunk] = true;
      } else {
        const std::int32_t s = victim(windows[w], keep[w]);
        if (s < 0) {
          open[w] = 0;
        } else {
          assign(visit.chunk, static_cast<std::uint32_t>(s));
          keep[w][s] = true;
          --open[w];
        }
      }
    }
    if (visit.updates) due[visit.chunk] = true;
  }
}

// Every copy of the chunk's weights is stale. A slot that a visit still holds stays with that visit, and so does the
// upload that it waits for.
void Scheduler::Impl::drop_copies(std::uint32_t chunk) {
  Chunk& c = chunks[chunk];
  if (c.slot < 0) return;
  Slot& slot = windows[c.spec.window].slots[c.slot];
  slot.occupant = -1;
  if (slot.pins == 0 || slot.issued) slot.upload = 0;
  c.slot = -1;
}

}  // namespace slidecore
