// The lanes' threads: each takes tasks from its queue, waits for what the task depends on, and puts the work on its
// stream (upload, download) or does it (update).

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "scheduler/scheduler_impl.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

constexpr std::chrono::microseconds kLookAgain{200};

// Runs a part of a lane's work; what it throws is an Error that begins with `what()`.
template <class What, class Work>
void described(const What& what, const Work& work) {
  try {
    work();
  } catch (const Error& e) {
    throw Error(e.code(), what() + ": " + e.what());
  } catch (const std::exception& e) {
    throw Error(Code::state, what() + ": " + e.what());
  } catch (...) {
    throw Error(Code::state, what() + ": an unknown error");
  }
}

}  // namespace

// " of chunk 'name'", or nothing for transfers that belong to none.
std::string Scheduler::Impl::of_chunk(std::int32_t chunk) const {
  const bool named = chunk >= 0 && static_cast<std::size_t>(chunk) < chunks.size();
  return named ? " of chunk '" + chunks[chunk].spec.name + "'" : "";
}

void Scheduler::Impl::run_lane(const char* name, void (Impl::*step)(std::unique_lock<std::mutex>&)) {
  pthread_setname_np(pthread_self(), name);
  try {
    device->bind_thread();
    std::unique_lock lock(mutex);
    while (!stopping && failure == nullptr) (this->*step)(lock);
  } catch (...) {
    fail(name, std::current_exception());
  }
}

void Scheduler::Impl::fail(const std::string& lane, std::exception_ptr error) {
  std::exception_ptr named;
  try {
    std::rethrow_exception(error);
  } catch (const Error& e) {
    named = std::make_exception_ptr(Error(e.code(), lane + " lane: " + e.what()));
  } catch (const std::exception& e) {
    named = std::make_exception_ptr(Error(Code::state, lane + " lane: " + e.what()));
  } catch (...) {
    named = std::make_exception_ptr(Error(Code::state, lane + " lane: unknown error"));
  }
  {
    std::lock_guard lock(mutex);
    if (failure == nullptr) failure = named;
  }
  if (ring) ring->stop();
  changed.notify_all();
}

// The slot was given to another chunk, or the weights changed, before the copy began.
bool Scheduler::Impl::upload_void(const UploadTask& task) const {
  return task.is_weights && windows[task.window].slots[task.slot].upload != task.upload;
}

bool Scheduler::Impl::upload_ready(const UploadTask& task) const {
  if (!task.is_weights) return ticket_issued(task.after);
  const Chunk& chunk = chunks[task.chunk];
  return upload_void(task) || chunk.updated == chunk.submitted;
}

// Takes the first task that can go: weights that wait for their update do not hold up what is behind them.
void Scheduler::Impl::upload_step(std::unique_lock<std::mutex>& lock) {
  auto ready = uploads.end();
  changed.wait(lock, [&] {
    ready = std::find_if(uploads.begin(), uploads.end(), [&](const UploadTask& t) { return upload_ready(t); });
    return stopping || failure != nullptr || ready != uploads.end();
  });
  if (stopping || failure != nullptr) return;
  const UploadTask task = *ready;
  uploads.erase(ready);
  if (!upload_void(task)) {
    ++upload_busy;
    if (task.is_weights) {
      described([&] { return "upload" + of_chunk(task.chunk); }, [&] { upload_weights(task, lock); });
    } else {
      described([&] { return "fetch of an input" + of_chunk(task.chunk); }, [&] { upload_input(task, lock); });
    }
    --upload_busy;
  }
  changed.notify_all();
}

void Scheduler::Impl::upload_weights(const UploadTask& task, std::unique_lock<std::mutex>& lock) {
  Chunk& chunk = chunks[task.chunk];
  Slot& slot = windows[task.window].slots[task.slot];
  const std::vector<Release> released = std::exchange(slot.released, {});
  const ChunkSpec& spec = chunk.spec;
  ++chunk.reading;
  lock.unlock();
  for (const Release& release : released) {
    device->wait(upload_stream, release.event);
    events.give(release.event);
  }
  if (spec.on_disk != nullptr) {
    if (sink) sink->settle(static_cast<std::uint32_t>(task.chunk));
    upload_from_disk(spec.on_disk, slot.address, spec.weight_bytes, SpanKind::weights, task.chunk);
  } else {
    const EventHandle start = spans.mark(upload_stream);
    device->to_device(slot.address, spec.weight, spec.weight_bytes, upload_stream);
    const EventHandle end = spans.mark(upload_stream);
    spans.add(Lane::upload, SpanKind::weights, task.chunk, start, end, spec.weight_bytes);
  }
  device->record(slot.ready, upload_stream);
  // The chunk's own: the slot's is recorded again by the next chunk's upload, which may have to wait for a visit.
  const EventHandle read = chunk.last_upload != 0 ? chunk.last_upload : events.take();
  device->record(read, upload_stream);
  lock.lock();
  --chunk.reading;
  chunk.last_upload = read;
  // Had the slot been given away meanwhile, its next upload follows this one on the same stream.
  if (slot.upload == task.upload) slot.issued = true;
  ++counters.uploads;
  counters.upload_bytes += spec.weight_bytes;
}

void Scheduler::Impl::upload_input(const UploadTask& task, std::unique_lock<std::mutex>& lock) {
  const auto after = ticket_event(task.after);
  lock.unlock();
  device->wait(upload_stream, task.after_work);
  if (after != nullptr) device->wait(upload_stream, *after);
  events.give(task.after_work);
  if (task.on_disk != nullptr && options.gpu_direct != nullptr) {
    upload_directly(task);
  } else if (task.on_disk != nullptr) {
    wait_for_writes(task.on_disk.get());
    upload_from_disk(task.on_disk, task.device, task.bytes, SpanKind::input_in, task.chunk);
  } else {
    const EventHandle start = spans.mark(upload_stream);
    device->to_device(task.device, task.host, task.bytes, upload_stream);
    const EventHandle end = spans.mark(upload_stream);
    spans.add(Lane::upload, SpanKind::input_in, task.chunk, start, end, task.bytes);
  }
  lock.lock();
  issue_ticket(task.ticket, upload_stream);
}

void Scheduler::Impl::download_step(std::unique_lock<std::mutex>& lock) {
  changed.wait(lock, [&] { return stopping || failure != nullptr || !downloads.empty(); });
  if (stopping || failure != nullptr) return;
  const DownloadTask task = downloads.front();
  downloads.pop_front();
  ++download_busy;
  const char* of = task.kind == Download::input ? "save of an input" : "download of the gradient";
  const bool for_sink = task.kind == Download::to_update || task.kind == Download::to_sum;
  described([&] { return of + of_chunk(task.chunk); },
            [&] { for_sink ? download_in_pieces(task, lock) : download_whole(task, lock); });
  --download_busy;
  changed.notify_all();
}

void Scheduler::Impl::download_whole(const DownloadTask& task, std::unique_lock<std::mutex>& lock) {
  const bool gradient = task.kind == Download::saved_gradient;
  if (gradient) {
    const Chunk& chunk = chunks[task.chunk];
    changed.wait(lock, [&] {
      const bool free = chunk.updated >= task.after_updates && chunk.summed >= task.after_sums;
      return stopping || failure != nullptr || free;
    });
    if (stopping || failure != nullptr) return;
  }
  lock.unlock();
  device->wait(download_stream, task.after_work);
  events.give(task.after_work);
  std::vector<Ticket> writes;
  if (task.on_disk != nullptr && options.gpu_direct != nullptr) {
    download_directly(task);
  } else if (task.on_disk != nullptr) {
    writes = download_to_disk(task);
  } else {
    const EventHandle start = spans.mark(download_stream);
    device->to_host(task.host, task.device, task.bytes, download_stream);
    const EventHandle end = spans.mark(download_stream);
    spans.add(Lane::download, gradient ? SpanKind::gradient : SpanKind::input_out, task.chunk, start, end, task.bytes);
  }
  lock.lock();
  if (!writes.empty()) input_writes[task.on_disk.get()] = std::move(writes);
  issue_ticket(task.ticket, download_stream);
  if (gradient) {
    ++counters.gradients;
    counters.gradient_bytes += task.bytes;
  }
}

void Scheduler::Impl::download_in_pieces(const DownloadTask& task, std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  device->wait(download_stream, task.after_work);
  events.give(task.after_work);
  const std::size_t piece_bytes = ring->piece_bytes();
  for (std::size_t offset = 0; offset < task.bytes; offset += piece_bytes) {
    const std::size_t bytes = std::min(piece_bytes, task.bytes - offset);
    void* piece = ring->acquire();
    if (piece == nullptr) {  // stopped: the lane's loop ends
      lock.lock();
      return;
    }
    const EventHandle start = spans.mark(download_stream);
    device->to_host(piece, static_cast<const char*>(task.device) + offset, bytes, download_stream);
    const EventHandle end = spans.mark(download_stream);
    spans.add(Lane::download, SpanKind::gradient, task.chunk, start, end, bytes);
    const EventHandle landed = events.take();
    device->record(landed, download_stream);
    std::lock_guard guard(mutex);
    queue_update({static_cast<std::uint32_t>(task.chunk), offset, bytes, piece, landed, offset == 0,
                  offset + bytes == task.bytes, task.kind == Download::to_update, task.after_updates, task.after_sums});
  }
  lock.lock();
  issue_ticket(task.ticket, download_stream);
  ++counters.gradients;
  counters.gradient_bytes += task.bytes;
}

// Host updates go in their order. Nothing waits in a circle: what one waits for was asked for before it, and so went
// into the download lane's queue before all that waits for it.
bool Scheduler::Impl::host_update_ready() const {
  if (host_updates.empty()) return false;
  const HostUpdate& next = host_updates.front();
  const Chunk& chunk = chunks[next.chunk];
  return ticket_issued(next.after) && chunk.summed >= next.after_sums && chunk.updated >= next.after_updates;
}

void Scheduler::Impl::queue_update(UpdateTask task) {
  if (task.changes_weights && sink->needs_stage(task.chunk)) {
    if (options.transfers == nullptr) {  // nobody would stage it
      throw Error(Code::state, "update" + of_chunk(static_cast<std::int32_t>(task.chunk)) +
                                   ": planes of the sink lie on disk, and the scheduler was made without transfers");
    }
    task.stage = UpdateTask::Stage::needed;
  }
  updates.push_back(task);
  changed.notify_all();
}

// How soon the chunk's weights are needed: 0, a visit waits for them.
std::size_t Scheduler::Impl::urgency(std::uint32_t index) const {
  const Chunk& chunk = chunks[index];
  const bool awaited = std::any_of(chunk.held.begin(), chunk.held.end(), [](const Hold& h) { return !h.granted; });
  return awaited ? 0 : 1 + next_use(static_cast<std::int32_t>(index));
}

// Whether the piece is in memory, not only on its way: its copy is enqueued behind the visit's computation.
bool Scheduler::Impl::landed(UpdateTask& task) {
  if (task.landed == 0 || task.has_landed) return true;
  described([&] { return "download of the gradient" + of_chunk(static_cast<std::int32_t>(task.chunk)); },
            [&] { task.has_landed = device->done(task.landed); });
  return task.has_landed;
}

// The piece to consume next. A chunk's pieces go in their order; of the chunks, the one whose weights are needed
// soonest comes first. In backward that is the latest: what the ring holds of the others is updated while the next
// forward is still far from them, so the lane need not idle then. What still comes from disk or from the device is
// waited for only where there is nothing else to do.
PieceChoice Scheduler::Impl::most_urgent_piece() {
  PieceChoice best{updates.size(), Awaits::nothing};
  std::pair<Awaits, std::size_t> best_use;
  std::vector<bool> seen(chunks.size(), false);
  for (std::size_t i = 0; i < updates.size(); ++i) {
    UpdateTask& task = updates[i];
    // One that waits for an update of its chunk may be queued before it, if that update's gradient is on the host.
    if (seen[task.chunk] || chunks[task.chunk].updated < task.after_updates) continue;
    seen[task.chunk] = true;
    if (task.stage == UpdateTask::Stage::needed || task.stage == UpdateTask::Stage::asked_for) continue;
    std::pair<Awaits, std::size_t> use{Awaits::landing, 0};  // the first in the queue lands first
    if (landed(task)) {
      const bool reads = task.stage == UpdateTask::Stage::staged && !sink->staged(task.chunk, task.offset);
      use = {reads ? Awaits::read : Awaits::nothing, urgency(task.chunk)};
    }
    if (best.index == updates.size() || use < best_use) {
      best = {i, use.first};
      best_use = use;
    }
  }
  return best;
}

void Scheduler::Impl::update_step(std::unique_lock<std::mutex>& lock) {
  PieceChoice piece{};
  // So many pieces of host updates are queued that the disk lane has some to stage ahead, where there is one.
  const std::size_t ahead = options.transfers == nullptr ? 1 : options.disk_pieces;
  const auto expands = [&] { return from_host < ahead && host_update_ready(); };
  for (;;) {
    if (stopping || failure != nullptr) return;
    if (expands()) break;
    piece = most_urgent_piece();
    if (piece.index == updates.size()) {
      changed.wait(lock);
      continue;
    }
    // Where pieces wait for reads and others for landings, nobody knows which is over first, and nobody tells: the lane
    // looks again.
    const bool either =
        piece.awaits != Awaits::nothing && std::any_of(updates.begin(), updates.end(), [&](const UpdateTask& t) {
          return piece.awaits == Awaits::read ? t.landed != 0 && !t.has_landed : t.stage != UpdateTask::Stage::none;
        });
    if (!either) break;
    changed.wait_for(lock, kLookAgain);
  }
  ++update_busy;  // before a queue is taken from, lest synchronize() finds neither a task in it nor the lane at work
  if (expands()) {
    const HostUpdate update = host_updates.front();
    host_updates.pop_front();
    queue_from_host(update, lock);
  } else {
    const UpdateTask task = updates[piece.index];
    updates.erase(updates.begin() + static_cast<std::ptrdiff_t>(piece.index));
    if (task.landed == 0) --from_host;
    consume(task, lock);
  }
  --update_busy;
  changed.notify_all();
}

void Scheduler::Impl::queue_from_host(const HostUpdate& update, std::unique_lock<std::mutex>& lock) {
  const auto arrived = ticket_event(update.after);
  if (arrived != nullptr) {
    lock.unlock();
    described([&] { return "update" + of_chunk(static_cast<std::int32_t>(update.chunk)); },
              [&] { device->synchronize_event(*arrived); });
    lock.lock();
  }
  const std::size_t piece_bytes = options.piece_bytes;
  for (std::size_t offset = 0; offset < update.bytes; offset += piece_bytes) {
    const std::size_t bytes = std::min(piece_bytes, update.bytes - offset);
    ++from_host;
    queue_update({update.chunk, offset, bytes, update.gradient + offset, 0, offset == 0, offset + bytes == update.bytes,
                  true, update.after_updates, update.after_sums});
  }
}

void Scheduler::Impl::consume(const UpdateTask& task, std::unique_lock<std::mutex>& lock) {
  Chunk& chunk = chunks[task.chunk];
  EventHandle last_upload = 0;
  if (task.first && task.changes_weights) {
    // From here on the plane changes: no upload may be reading it. New ones wait, as submitted > updated.
    changed.wait(lock, [&] { return stopping || failure != nullptr || chunk.reading == 0; });
    if (stopping || failure != nullptr) return;
    last_upload = chunk.last_upload;
  }
  lock.unlock();
  const auto what = [&] {
    return (task.changes_weights ? "update" : "sum of gradients") + of_chunk(static_cast<std::int32_t>(task.chunk)) +
           ", bytes " + std::to_string(task.offset) + " to " + std::to_string(task.offset + task.bytes);
  };
  const bool in_ring = task.landed != 0;
  described(what, [&] {
    if (last_upload != 0) device->synchronize_event(last_upload);
    if (in_ring) device->synchronize_event(task.landed);
  });
  if (in_ring) events.give(task.landed);
  const std::int64_t start = trace.now_ns();
  described(what, [&] {
    if (task.first) sink->begin(task.chunk);
    sink->consume(task.chunk, task.offset, task.piece, task.bytes);
    if (task.last) sink->end(task.chunk);
  });
  const std::int64_t end = trace.now_ns();
  // The clock restarts with the trace, which may have been turned on or off meanwhile.
  if (trace.enabled() && end >= start) {
    const SpanKind kind = task.changes_weights ? SpanKind::update : SpanKind::sum;
    trace.add({Lane::update, kind, static_cast<std::int32_t>(task.chunk), start, end, task.bytes});
  }
  if (in_ring) ring->release(const_cast<void*>(task.piece));
  lock.lock();
  if (task.stage == UpdateTask::Stage::staged) ++unstaged;
  if (task.last) ++(task.changes_weights ? chunk.updated : chunk.summed);
  changed.notify_all();
}

}  // namespace slidecore
