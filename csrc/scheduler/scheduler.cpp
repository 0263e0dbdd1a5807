#include "slidecore/scheduler.h"

#include <algorithm>

#include "scheduler/scheduler_impl.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

std::shared_ptr<Device> checked(std::shared_ptr<Device> device) {
  if (device == nullptr) throw Error(Code::invalid_argument, "a scheduler needs a device");
  return device;
}

const SchedulerOptions& checked(const SchedulerOptions& options) {
  if (options.piece_bytes == 0 || options.piece_bytes % 4096 != 0) {
    throw Error(Code::invalid_argument,
                "piece_bytes must be a positive multiple of 4096, not " + std::to_string(options.piece_bytes));
  }
  if (options.ring_pieces < 2) throw Error(Code::invalid_argument, "ring_pieces must be at least 2");
  if (options.transfers != nullptr && options.disk_pieces < 2) {
    throw Error(Code::invalid_argument, "disk_pieces must be at least 2");
  }
  return options;
}

}  // namespace

Scheduler::Impl::Impl(std::shared_ptr<Device> device_, std::shared_ptr<GradientSink> sink_, SchedulerOptions options_)
    : device(checked(std::move(device_))),
      sink(std::move(sink_)),
      options(checked(options_)),
      trace(options.trace_spans),
      events(device),
      spans(device, events, trace) {}

// Delegates, so that the destructor runs if this throws: what was begun is ended.
Scheduler::Impl::Impl(std::shared_ptr<Device> device_, std::vector<ChunkSpec> specs,
                      std::vector<WindowSpec> window_specs, std::shared_ptr<GradientSink> sink_,
                      SchedulerOptions options_)
    : Impl(std::move(device_), std::move(sink_), options_) {
  for (const WindowSpec& spec : window_specs) {
    if (spec.slots.empty()) throw Error(Code::invalid_argument, "a window needs at least one slot");
    Window window;
    window.slot_bytes = spec.slot_bytes;
    for (void* address : spec.slots) {
      Slot slot;
      slot.address = address;
      slot.ready = events.take();
      window.slots.push_back(slot);
    }
    windows.push_back(std::move(window));
  }
  for (ChunkSpec& spec : specs) {
    if (spec.window >= windows.size()) {
      throw Error(Code::invalid_argument,
                  "chunk '" + spec.name + "': there is no window " + std::to_string(spec.window));
    }
    if (spec.weight_bytes > windows[spec.window].slot_bytes) {
      throw Error(Code::invalid_argument, "chunk '" + spec.name + "' has " + std::to_string(spec.weight_bytes) +
                                              " bytes, more than its window's slots of " +
                                              std::to_string(windows[spec.window].slot_bytes));
    }
    check_place(spec, spec.weight, spec.on_disk.get());
    Chunk chunk;
    chunk.spec = std::move(spec);
    chunks.push_back(std::move(chunk));
  }
  if (sink) ring = std::make_unique<Ring>(device, options.piece_bytes, options.ring_pieces);
  if (options.transfers != nullptr) {
    disk_pieces = std::make_unique<HostBuffer>(device, options.disk_pieces * options.piece_bytes, /*pinned=*/true);
    disk_piece_read.assign(options.disk_pieces, 0);
    options.transfers->observe([this](const TransferSpan& span) {
      if (!trace.enabled()) return;
      const std::int64_t start = trace.since_ns(span.start);
      if (start < 0) return;  // it began before the trace did
      const SpanKind kind = span.write ? SpanKind::write : SpanKind::read;
      trace.add({Lane::disk, kind, -1, start, trace.since_ns(span.end), span.bytes});
    });
  }
  upload_stream = device->create_stream();
  download_stream = device->create_stream();
  threads.emplace_back([this] { run_lane("upload", &Impl::upload_step); });
  threads.emplace_back([this] { run_lane("download", &Impl::download_step); });
  threads.emplace_back([this] { run_lane("update", &Impl::update_step); });
  if (options.transfers != nullptr) threads.emplace_back([this] { run_lane("disk", &Impl::disk_step); });
}

void Scheduler::Impl::stop() {
  {
    std::lock_guard lock(mutex);
    stopping = true;
  }
  if (ring) ring->stop();
  changed.notify_all();
  for (std::thread& thread : threads) thread.join();
  threads.clear();
}

Scheduler::Impl::~Impl() {
  stop();
  if (options.transfers != nullptr) {
    options.transfers->observe(nullptr);
    try {
      options.transfers->synchronize();  // reads in flight still use the pieces
    } catch (const Error&) {
      // They have failed or are closed: nothing is in flight.
    }
  }
  // Copies in flight still use the planes, the slots and the ring.
  for (const StreamHandle stream : {upload_stream, download_stream}) {
    if (stream == 0) continue;
    try {
      device->synchronize(stream);
    } catch (const Error&) {
      // The device is gone or failed; there is nothing left to wait for.
    }
    try {
      device->destroy_stream(stream);
    } catch (const Error&) {
      // It went with the device.
    }
  }
}

void Scheduler::Impl::throw_if_failed() const {
  if (failure != nullptr) std::rethrow_exception(failure);
  if (stopping) throw Error(Code::state, "the scheduler is closed");
}

void Scheduler::Impl::check_chunk(std::uint32_t chunk) const {
  if (chunk >= chunks.size()) {
    throw Error(Code::invalid_argument,
                "there is no chunk " + std::to_string(chunk) + "; there are " + std::to_string(chunks.size()));
  }
}

Scheduler::Scheduler(std::shared_ptr<Device> device, std::vector<ChunkSpec> chunks, std::vector<WindowSpec> windows,
                     std::shared_ptr<GradientSink> sink, SchedulerOptions options)
    : impl_(
          std::make_unique<Impl>(std::move(device), std::move(chunks), std::move(windows), std::move(sink), options)) {}

Scheduler::~Scheduler() = default;

void Scheduler::set_schedule(std::vector<Visit> visits) {
  std::lock_guard lock(impl_->mutex);
  impl_->throw_if_failed();
  for (const Visit& visit : visits) impl_->check_chunk(visit.chunk);
  impl_->schedule = std::move(visits);
  impl_->position = 0;
  // A gradient that has not come by now belongs to a step that was given up.
  for (Chunk& chunk : impl_->chunks) chunk.update_due = false;
  impl_->prefetch();
}

// The thread's own innermost visit: another thread's may be in another slot, if an update came in between. A thread
// that has none releases the innermost of all.
std::list<Hold>::iterator Chunk::hold_to_release(std::thread::id thread) {
  auto found = held.end();
  for (auto hold = held.begin(); hold != held.end(); ++hold) {
    if (!hold->granted) continue;
    if (found == held.end() || hold->thread == thread || found->thread != thread) found = hold;
  }
  return found;
}

// Returns once `stream` waits for the upload into the slot.
void Scheduler::Impl::await_slot(const Slot& slot, Hold& hold, std::uint32_t chunk, StreamHandle stream,
                                 std::unique_lock<std::mutex>& lock) {
  // Before anything waits: the stream idles just as much while this thread waits for an update as when it waits itself.
  const EventHandle before = spans.mark(stream);
  try {
    wait_for(lock, [&] { return slot.issued; });
  } catch (...) {
    spans.discard(before);
    throw;
  }
  lock.unlock();
  device->wait(stream, slot.ready);
  hold.began = spans.mark(stream);
  spans.add(Lane::compute, SpanKind::wait, static_cast<std::int32_t>(chunk), before, hold.began, 0, /*keep_end=*/true);
  lock.lock();
  hold.granted = true;
}

void* Scheduler::acquire(std::uint32_t chunk, Phase phase, StreamHandle stream) {
  Impl& s = *impl_;
  std::unique_lock lock(s.mutex);
  s.throw_if_failed();
  s.check_chunk(chunk);
  Chunk& c = s.chunks[chunk];
  Window& window = s.windows[c.spec.window];
  const auto is_held = [](const Slot& slot) { return slot.pins > 0; };
  if (c.slot < 0 && std::all_of(window.slots.begin(), window.slots.end(), is_held)) {
    throw Error(Code::state, "no slot for chunk '" + c.spec.name + "': all " + std::to_string(window.slots.size()) +
                                 " slots of its window are held by visits in progress; use a larger window");
  }
  s.set_position(chunk, phase);
  const bool hit = c.slot >= 0;
  if (!hit) {
    const std::int32_t victim = s.victim(window, std::vector<bool>(window.slots.size(), false));
    s.assign(chunk, static_cast<std::uint32_t>(victim));
  }
  const auto index = static_cast<std::uint32_t>(c.slot);
  Slot& slot = window.slots[index];
  const auto hold = c.held.insert(c.held.end(), {index, std::this_thread::get_id()});
  ++slot.pins;
  ++s.counters.visits;
  if (hit) ++s.counters.hits;
  s.prefetch();
  try {
    s.await_slot(slot, *hold, chunk, stream, lock);
  } catch (...) {
    // The visit does not take place.
    if (!lock.owns_lock()) lock.lock();
    --slot.pins;
    c.held.erase(hold);
    throw;
  }
  return slot.address;
}

void Scheduler::release(std::uint32_t chunk, Phase phase, StreamHandle stream) {
  Impl& s = *impl_;
  std::unique_lock lock(s.mutex);
  s.check_chunk(chunk);
  Chunk& c = s.chunks[chunk];
  const auto hold = c.hold_to_release(std::this_thread::get_id());
  if (hold == c.held.end()) throw Error(Code::state, "chunk '" + c.spec.name + "' is released but no visit holds it");
  Slot& slot = s.windows[c.spec.window].slots[hold->slot];
  // What may fail comes first: the visit holds its slot until its end is recorded.
  const EventHandle ended = hold->began == 0 ? 0 : s.spans.mark(stream);
  // A visit on another stream has an event of its own: neither stream has to wait for the other's work.
  auto release =
      std::find_if(slot.released.begin(), slot.released.end(), [&](const Release& r) { return r.stream == stream; });
  if (release == slot.released.end()) {
    release = slot.released.insert(release, {stream, s.events.take()});
  }
  s.device->record(release->event, stream);
  const EventHandle began = hold->began;
  c.held.erase(hold);
  --slot.pins;
  if (began != 0) {
    const SpanKind kind = phase == Phase::forward ? SpanKind::visit_forward : SpanKind::visit_backward;
    s.spans.add(Lane::compute, kind, static_cast<std::int32_t>(chunk), began, ended, 0);
  }
  s.throw_if_failed();
  s.prefetch();
}

void Scheduler::Impl::check_gradient(std::uint32_t chunk, std::size_t bytes, bool for_sink) const {
  check_chunk(chunk);
  if (for_sink && !sink) {
    throw Error(Code::state, "a gradient was submitted, but this scheduler has no sink for gradients");
  }
  if (bytes == 0)
    throw Error(Code::invalid_argument, "the gradient of chunk '" + chunks[chunk].spec.name + "' is empty");
}

// Puts the task into the queue, behind the work on `stream` so far.
Ticket Scheduler::Impl::download(DownloadTask task, StreamHandle stream) {
  task.after_work = events.take();
  device->record(task.after_work, stream);
  task.ticket = new_ticket();
  downloads.push_back(task);
  changed.notify_all();
  return task.ticket;
}

// The chunk's weights will be new.
void Scheduler::Impl::expect_update(std::uint32_t chunk) {
  ++chunks[chunk].submitted;
  drop_copies(chunk);
  pass_update(chunk);
  prefetch();
  changed.notify_all();
}

Ticket Scheduler::submit_gradient(std::uint32_t chunk, const void* gradient, std::size_t bytes, StreamHandle stream) {
  Impl& s = *impl_;
  std::lock_guard lock(s.mutex);
  s.throw_if_failed();
  s.check_gradient(chunk, bytes, /*for_sink=*/true);
  const Ticket ticket = s.download({.kind = Download::to_update,
                                    .chunk = static_cast<std::int32_t>(chunk),
                                    .device = gradient,
                                    .bytes = bytes,
                                    .after_updates = s.chunks[chunk].submitted,
                                    .after_sums = s.chunks[chunk].to_sum},
                                   stream);
  // Only now, as device calls may fail: uploads of the chunk would wait for ever for a gradient that is not queued.
  s.expect_update(chunk);
  return ticket;
}

Ticket Scheduler::add_gradient(std::uint32_t chunk, const void* gradient, std::size_t bytes, StreamHandle stream) {
  Impl& s = *impl_;
  std::lock_guard lock(s.mutex);
  s.throw_if_failed();
  s.check_gradient(chunk, bytes, /*for_sink=*/true);
  const Ticket ticket = s.download({.kind = Download::to_sum,
                                    .chunk = static_cast<std::int32_t>(chunk),
                                    .device = gradient,
                                    .bytes = bytes,
                                    .after_updates = s.chunks[chunk].submitted},
                                   stream);
  ++s.chunks[chunk].to_sum;
  return ticket;
}

Ticket Scheduler::save_gradient(std::uint32_t chunk, void* host, const void* gradient, std::size_t bytes,
                                StreamHandle stream) {
  Impl& s = *impl_;
  std::lock_guard lock(s.mutex);
  s.throw_if_failed();
  s.check_gradient(chunk, bytes, /*for_sink=*/false);
  if (host == nullptr) throw Error(Code::invalid_argument, "a gradient cannot be saved at a null address");
  return s.download({.kind = Download::saved_gradient,
                     .chunk = static_cast<std::int32_t>(chunk),
                     .device = gradient,
                     .host = host,
                     .bytes = bytes,
                     .after_updates = s.chunks[chunk].submitted,
                     .after_sums = s.chunks[chunk].to_sum},
                    stream);
}

void Scheduler::update(std::uint32_t chunk, const void* gradient, std::size_t bytes, Ticket after) {
  Impl& s = *impl_;
  std::lock_guard lock(s.mutex);
  s.throw_if_failed();
  s.check_gradient(chunk, bytes, /*for_sink=*/true);
  s.check_ticket(after);
  if (gradient == nullptr) {
    throw Error(Code::invalid_argument,
                "chunk '" + s.chunks[chunk].spec.name + "' cannot be updated from a null address");
  }
  const Chunk& c = s.chunks[chunk];
  s.host_updates.push_back({chunk, static_cast<const char*>(gradient), bytes, after, c.to_sum, c.submitted});
  s.expect_update(chunk);
}

Ticket Scheduler::save_input(std::int32_t chunk, void* host, const void* device, std::size_t bytes,
                             StreamHandle stream) {
  Impl& s = *impl_;
  std::lock_guard lock(s.mutex);
  s.throw_if_failed();
  return s.download({.kind = Download::input, .chunk = chunk, .device = device, .host = host, .bytes = bytes}, stream);
}

Ticket Scheduler::save_input(std::int32_t chunk, std::shared_ptr<const Region> on_disk, const void* device,
                             std::size_t bytes, StreamHandle stream) {
  Impl& s = *impl_;
  std::lock_guard lock(s.mutex);
  s.throw_if_failed();
  s.check_disk_input(on_disk.get(), bytes);
  return s.download(
      {.kind = Download::input, .chunk = chunk, .device = device, .bytes = bytes, .on_disk = std::move(on_disk)},
      stream);
}

Ticket Scheduler::Impl::fetch(UploadTask task, StreamHandle stream) {
  check_ticket(task.after);
  task.after_work = events.take();
  device->record(task.after_work, stream);
  task.ticket = new_ticket();
  uploads.push_back(task);
  changed.notify_all();
  return task.ticket;
}

Ticket Scheduler::fetch_input(std::int32_t chunk, void* device, const void* host, std::size_t bytes,
                              StreamHandle stream, Ticket after) {
  Impl& s = *impl_;
  std::lock_guard lock(s.mutex);
  s.throw_if_failed();
  return s.fetch({.is_weights = false, .chunk = chunk, .device = device, .host = host, .bytes = bytes, .after = after},
                 stream);
}

Ticket Scheduler::fetch_input(std::int32_t chunk, void* device, std::shared_ptr<const Region> on_disk,
                              std::size_t bytes, StreamHandle stream, Ticket after) {
  Impl& s = *impl_;
  std::lock_guard lock(s.mutex);
  s.throw_if_failed();
  s.check_disk_input(on_disk.get(), bytes);
  return s.fetch({.is_weights = false,
                  .chunk = chunk,
                  .device = device,
                  .bytes = bytes,
                  .after = after,
                  .on_disk = std::move(on_disk)},
                 stream);
}

bool Scheduler::done(Ticket ticket) {
  Impl& s = *impl_;
  std::lock_guard lock(s.mutex);
  s.throw_if_failed();
  s.check_ticket(ticket);
  if (!s.ticket_issued(ticket)) return false;
  const auto event = s.ticket_event(ticket);
  return event == nullptr || s.device->done(*event);
}

void Scheduler::wait(Ticket ticket, StreamHandle stream) {
  Impl& s = *impl_;
  std::unique_lock lock(s.mutex);
  s.check_ticket(ticket);
  s.wait_for(lock, [&] { return s.ticket_issued(ticket); });
  const auto event = s.ticket_event(ticket);
  lock.unlock();
  if (event != nullptr) s.device->wait(stream, *event);
}

void Scheduler::synchronize_ticket(Ticket ticket) {
  Impl& s = *impl_;
  std::unique_lock lock(s.mutex);
  s.check_ticket(ticket);
  s.wait_for(lock, [&] { return s.ticket_issued(ticket); });
  const auto event = s.ticket_event(ticket);
  lock.unlock();
  if (event != nullptr) s.device->synchronize_event(*event);
}

void Scheduler::Impl::check_place(const ChunkSpec& spec, const void* weight, const Region* on_disk) const {
  const std::string name = "chunk '" + spec.name + "'";
  if (on_disk == nullptr) return;
  if (options.transfers == nullptr) {
    throw Error(Code::invalid_argument, name + ": weights can lie on disk where there are transfers");
  }
  if (weight != nullptr) throw Error(Code::invalid_argument, name + ": weights are given in memory and on disk");
  if (on_disk->size() < spec.weight_bytes) {
    throw Error(Code::invalid_argument, name + ": weights of " + std::to_string(spec.weight_bytes) +
                                            " bytes do not fit in the region '" + on_disk->name() + "' of " +
                                            std::to_string(on_disk->size()));
  }
}

void Scheduler::place_weight(std::uint32_t chunk, const void* weight, std::shared_ptr<const Region> on_disk) {
  Impl& s = *impl_;
  std::lock_guard lock(s.mutex);
  s.throw_if_failed();
  s.check_chunk(chunk);
  ChunkSpec& spec = s.chunks[chunk].spec;
  s.check_place(spec, weight, on_disk.get());
  if (weight == nullptr && on_disk == nullptr) {
    throw Error(Code::invalid_argument, "chunk '" + spec.name + "': its weights must lie somewhere");
  }
  spec.weight = weight;
  spec.on_disk = std::move(on_disk);
}

void Scheduler::invalidate(std::uint32_t chunk) {
  std::lock_guard lock(impl_->mutex);
  impl_->throw_if_failed();
  impl_->check_chunk(chunk);
  impl_->drop_copies(chunk);
}

void Scheduler::wait_updates() {
  Impl& s = *impl_;
  std::unique_lock lock(s.mutex);
  s.wait_for(lock, [&] {
    for (const Chunk& chunk : s.chunks) {
      if (chunk.updated != chunk.submitted || chunk.summed != chunk.to_sum) return false;
    }
    return true;
  });
  s.settle_disk(lock);
}

void Scheduler::synchronize() {
  Impl& s = *impl_;
  std::unique_lock lock(s.mutex);
  s.wait_for(lock, [&] {
    return s.uploads.empty() && s.downloads.empty() && s.updates.empty() && s.host_updates.empty() &&
           s.upload_busy == 0 && s.download_busy == 0 && s.update_busy == 0 && s.disk_busy == 0;
  });
  s.settle_disk(lock);
  lock.unlock();
  s.device->synchronize(s.upload_stream);
  s.device->synchronize(s.download_stream);
}

void Scheduler::check() {
  std::lock_guard lock(impl_->mutex);
  impl_->throw_if_failed();
}

Trace& Scheduler::trace() {
  impl_->spans.resolve(false);
  return impl_->trace;
}

void Scheduler::start_trace() {
  synchronize();
  impl_->spans.resolve(true);  // of a trace before this one, measured from its start
  impl_->trace.enable();
  impl_->spans.start(impl_->upload_stream);
}

void Scheduler::stop_trace() {
  synchronize();
  impl_->trace.disable();
  impl_->spans.resolve(true);
}

std::string Scheduler::chrome_trace() {
  std::vector<std::string> names;
  for (const Chunk& chunk : impl_->chunks) names.push_back(chunk.spec.name);
  return trace().to_chrome_json(names);
}

Scheduler::Counters Scheduler::counters() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->counters;
}

}  // namespace slidecore
