// What lies on disk: the lane that stages pieces for updates, and uploads that read as they go.

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "scheduler/scheduler_impl.h"
#include "slidecore/status.h"

namespace slidecore {

// Index of the piece to stage next, or updates.size(): of those that have landed the one whose weights are needed
// soonest, else the one that lands next. No other can be consumed before that one, so its stage keeps nobody waiting,
// and a full staging always empties again.
std::size_t Scheduler::Impl::most_urgent_to_stage() {
  std::size_t best = updates.size();
  std::pair<bool, std::size_t> best_use;
  std::vector<bool> seen(chunks.size(), false);
  for (std::size_t i = 0; i < updates.size(); ++i) {
    UpdateTask& task = updates[i];
    if (seen[task.chunk] || task.stage != UpdateTask::Stage::needed) continue;
    const Chunk& chunk = chunks[task.chunk];
    // Else the sink may still be at a submission before this one.
    if (chunk.updated < task.after_updates || chunk.summed < task.after_sums) continue;
    seen[task.chunk] = true;
    const bool to_land = !landed(task);
    const std::pair<bool, std::size_t> use{to_land, to_land ? 0 : urgency(task.chunk)};
    if (best == updates.size() || use < best_use) {
      best = i;
      best_use = use;
    }
  }
  return best;
}

void Scheduler::Impl::disk_step(std::unique_lock<std::mutex>& lock) {
  std::size_t piece = 0;
  changed.wait(lock, [&] {
    if (stopping || failure != nullptr) return true;
    if (full_at == unstaged) return false;
    piece = most_urgent_to_stage();
    return piece < updates.size();
  });
  if (stopping || failure != nullptr) return;
  ++disk_busy;
  updates[piece].stage = UpdateTask::Stage::asked_for;
  const UpdateTask task = updates[piece];
  const std::uint64_t consumed = unstaged;
  lock.unlock();
  bool staged = false;
  try {
    staged = sink->stage(task.chunk, task.offset, task.bytes);
  } catch (const Error& error) {
    throw Error(error.code(), "reading what the update" + of_chunk(static_cast<std::int32_t>(task.chunk)) + ", bytes " +
                                  std::to_string(task.offset) + " to " + std::to_string(task.offset + task.bytes) +
                                  ", needs: " + error.what());
  }
  lock.lock();
  // The queue has changed, but nobody takes this piece before it is staged.
  const auto same = std::find_if(updates.begin(), updates.end(), [&](const UpdateTask& other) {
    return other.stage == UpdateTask::Stage::asked_for && other.chunk == task.chunk && other.offset == task.offset;
  });
  same->stage = staged ? UpdateTask::Stage::staged : UpdateTask::Stage::needed;
  if (!staged) full_at = consumed;
  --disk_busy;
  changed.notify_all();
}

// On the upload lane, without the mutex. Reads stay as many pieces ahead of the copies as there are pieces.
void Scheduler::Impl::upload_from_disk(const std::shared_ptr<const Region>& region, void* address, std::size_t bytes,
                                       SpanKind kind, std::int32_t chunk) {
  const std::size_t piece_bytes = options.piece_bytes, count = (bytes + piece_bytes - 1) / piece_bytes;
  const auto place = [&](std::size_t i) {
    return static_cast<char*>(disk_pieces->data()) + i % options.disk_pieces * piece_bytes;
  };
  const auto size = [&](std::size_t i) { return std::min(piece_bytes, bytes - i * piece_bytes); };
  std::vector<Ticket> reads;
  const auto read = [&](std::size_t i) {
    EventHandle& copied = disk_piece_read[i % options.disk_pieces];
    if (copied != 0) {
      device->synchronize_event(copied);
      events.give(std::exchange(copied, 0));
    }
    reads.push_back(options.transfers->read(region, i * piece_bytes, place(i), size(i)));
  };
  for (std::size_t i = 0; i < std::min(count, options.disk_pieces); ++i) read(i);
  for (std::size_t i = 0; i < count; ++i) {
    options.transfers->wait(reads[i]);
    const EventHandle start = spans.mark(upload_stream);
    device->to_device(static_cast<char*>(address) + i * piece_bytes, place(i), size(i), upload_stream);
    const EventHandle end = spans.mark(upload_stream);
    spans.add(Lane::upload, kind, chunk, start, end, size(i));
    const EventHandle copied = events.take();
    device->record(copied, upload_stream);
    disk_piece_read[i % options.disk_pieces] = copied;
    if (i + options.disk_pieces < count) read(i + options.disk_pieces);
  }
}

// On the download lane, without the mutex. Returns the writes, which go on; each piece is written while the next one
// is copied.
std::vector<Ticket> Scheduler::Impl::download_to_disk(const DownloadTask& task) {
  const std::size_t piece_bytes = options.piece_bytes, count = (task.bytes + piece_bytes - 1) / piece_bytes;
  if (input_pieces == nullptr) {
    input_pieces = std::make_unique<HostBuffer>(device, options.disk_pieces * piece_bytes, /*pinned=*/true);
    input_piece_written.assign(options.disk_pieces, 0);
  }
  const auto place = [&](std::size_t i) {
    return static_cast<char*>(input_pieces->data()) + i % options.disk_pieces * piece_bytes;
  };
  const auto size = [&](std::size_t i) { return std::min(piece_bytes, task.bytes - i * piece_bytes); };
  wait_for_writes(task.on_disk.get());  // of an input that was never fetched
  std::vector<Ticket> writes;
  std::vector<EventHandle> copied;
  const auto write = [&](std::size_t i) {
    device->synchronize_event(copied[i]);
    events.give(copied[i]);
    writes.push_back(options.transfers->write(task.on_disk, i * piece_bytes, place(i), size(i)));
    input_piece_written[i % options.disk_pieces] = writes.back();
  };
  for (std::size_t i = 0; i < count; ++i) {
    options.transfers->wait(input_piece_written[i % options.disk_pieces]);
    const EventHandle start = spans.mark(download_stream);
    device->to_host(place(i), static_cast<const char*>(task.device) + i * piece_bytes, size(i), download_stream);
    const EventHandle end = spans.mark(download_stream);
    spans.add(Lane::download, SpanKind::input_out, task.chunk, start, end, size(i));
    copied.push_back(events.take());
    device->record(copied.back(), download_stream);
    if (i > 0) write(i - 1);
  }
  write(count - 1);
  return writes;
}

// On an upload or download lane, without the mutex: once all that is on the stream so far is done.
template <class Transfer>
void Scheduler::Impl::transfer_directly(StreamHandle after, SpanKind kind, std::int32_t chunk, std::size_t bytes,
                                        const Transfer& transfer) {
  const EventHandle reached = events.take();
  device->record(reached, after);
  device->synchronize_event(reached);
  events.give(reached);
  const std::int64_t start = trace.now_ns();
  transfer();
  const std::int64_t end = trace.now_ns();
  // The clock restarts with the trace, which may have been turned on or off meanwhile.
  if (trace.enabled() && end >= start) trace.add({Lane::disk, kind, chunk, start, end, bytes});
}

void Scheduler::Impl::upload_directly(const UploadTask& task) {
  transfer_directly(upload_stream, SpanKind::read, task.chunk, task.bytes,
                    [&] { options.gpu_direct->read(task.on_disk, task.device, task.bytes); });
}

void Scheduler::Impl::download_directly(const DownloadTask& task) {
  transfer_directly(download_stream, SpanKind::write, task.chunk, task.bytes,
                    [&] { options.gpu_direct->write(task.on_disk, task.device, task.bytes); });
}

void Scheduler::Impl::wait_for_writes(const Region* region) {
  std::vector<Ticket> writes;
  {
    const std::lock_guard lock(mutex);
    if (auto found = input_writes.extract(region)) writes = std::move(found.mapped());
  }
  for (const Ticket write : writes) options.transfers->wait(write);
}

void Scheduler::Impl::check_disk_input(const Region* region, std::size_t bytes) const {
  if (options.transfers == nullptr) {
    throw Error(Code::invalid_argument, "inputs can be saved to disk where there are transfers");
  }
  if (region == nullptr || bytes == 0 || bytes > region->size()) {
    throw Error(Code::invalid_argument,
                "an input of " + std::to_string(bytes) + " bytes needs a region on disk that has room for it");
  }
}

// What was updated is on disk, as it would be in memory.
void Scheduler::Impl::settle_disk(std::unique_lock<std::mutex>& lock) {
  if (options.transfers == nullptr || sink == nullptr) return;
  lock.unlock();
  for (std::size_t c = 0; c < chunks.size(); ++c) sink->settle(static_cast<std::uint32_t>(c));
  lock.lock();
}

}  // namespace slidecore
