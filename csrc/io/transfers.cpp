#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "io/backend.h"
#include "io/errors.h"
#include "io/storage_impl.h"
#include "io/uring.h"
#include "io/work_queue.h"
#include "slidecore/status.h"

namespace slidecore {

struct Transfers::Impl {
  Impl(std::shared_ptr<Storage> storage, TransferOptions options);

  void use_uring();
  void use_threads();
  io::BackendSettings settings(std::size_t default_depth) const;
  void check_process() const;
  Ticket start(const std::shared_ptr<const Region>& region, bool write, std::uint64_t offset, char* memory,
               std::size_t bytes);

  const std::shared_ptr<Storage> storage;
  const TransferOptions options;
  const pid_t owner;
  io::WorkQueue queue;
  const char* name = "";
  std::string reason;  // why this backend
  std::size_t depth = 0;
  std::unique_ptr<io::Backend> backend;
};

Transfers::Impl::Impl(std::shared_ptr<Storage> storage_, TransferOptions options_)
    : storage(std::move(storage_)),
      options(std::move(options_)),
      owner(getpid()),
      queue(storage->impl_->files.size(), storage->impl_->unit) {
  const std::size_t unit = storage->alignment(), drives = storage->files().size();
  if (options.block_bytes == 0 || options.block_bytes % unit != 0 || options.block_bytes > std::size_t{1} << 30) {
    throw Error(Code::invalid_argument, "block_bytes must be a multiple of " + std::to_string(unit) +
                                            " up to 1 GiB, not " + std::to_string(options.block_bytes));
  }
  if (options.queue_depth > io::kMostRequests / drives) {
    throw Error(Code::invalid_argument, "queue_depth must be at most " + std::to_string(io::kMostRequests / drives) +
                                            " for " + std::to_string(drives) + " drives, not " +
                                            std::to_string(options.queue_depth));
  }
  if (!(options.patience_s >= 0)) throw Error(Code::invalid_argument, "patience_s must not be negative");
  std::string wanted = options.backend;
  std::string by = "asked for";
  if (wanted.empty()) {
    const char* variable = std::getenv("SLIDECORE_IO");
    wanted = variable != nullptr ? variable : "";
    by = "SLIDECORE_IO";
  }
  if (!wanted.empty() && wanted != "uring" && wanted != "threads") {
    throw Error(Code::invalid_argument,
                (by == "SLIDECORE_IO" ? by : "backend") + "='" + wanted + "' is unknown: use 'uring' or 'threads'");
  }
  if (wanted == "threads") {
    reason = by;
    use_threads();
  } else if (wanted == "uring") {
    reason = by;
    use_uring();
  } else {
    try {
      reason = "the kernel allows it";
      use_uring();
    } catch (const Error& error) {
      if (error.code() != Code::unsupported) throw;
      reason = error.what();
      use_threads();
    }
  }
}

io::BackendSettings Transfers::Impl::settings(std::size_t default_depth) const {
  return {options.queue_depth != 0 ? options.queue_depth : default_depth, options.patience_s};
}

void Transfers::Impl::use_uring() {
  const io::BackendSettings chosen = settings(io::kUringDepth);
  backend = io::make_uring_backend(*storage->impl_, queue, chosen);
  name = "uring";
  depth = chosen.queue_depth;
}

void Transfers::Impl::use_threads() {
  const io::BackendSettings chosen = settings(io::kThreadsDepth);
  backend = io::make_threads_backend(*storage->impl_, queue, chosen);
  name = "threads";
  depth = chosen.queue_depth;
}

void Transfers::Impl::check_process() const {
  if (getpid() != owner) throw Error(Code::state, "file transfers cannot be used in a child of fork()");
}

Ticket Transfers::Impl::start(const std::shared_ptr<const Region>& region, bool write, std::uint64_t offset,
                              char* memory, std::size_t bytes) {
  check_process();
  if (region == nullptr || region->storage_ != storage->impl_) {
    throw Error(Code::invalid_argument, "the region is not one of this Storage");
  }
  if (offset > region->size() || bytes > region->size() - offset) {
    throw Error(Code::invalid_argument, std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                                            " are not all in the region '" + region->name() + "' of " +
                                            std::to_string(region->size()) + " bytes");
  }
  if (bytes == 0) {
    queue.check();
    return 0;
  }
  if (memory == nullptr) throw Error(Code::invalid_argument, "a transfer needs memory");
  auto pieces = io::split(*storage->impl_, *region, write, offset, memory, bytes, options.block_bytes);
  auto transfer = std::make_unique<io::Transfer>();
  transfer->region = region;
  transfer->write = write;
  transfer->bytes = bytes;
  transfer->unread = pieces.size();
  return queue.push(std::move(transfer), std::move(pieces));
}

Transfers::Transfers(std::shared_ptr<Storage> storage, const TransferOptions& options) {
  if (storage == nullptr) throw Error(Code::invalid_argument, "Transfers need a Storage");
  impl_ = std::make_unique<Impl>(std::move(storage), options);
}

Transfers::~Transfers() {
  if (getpid() != impl_->owner) {
    static_cast<void>(impl_.release());  // its threads are the parent's
    return;
  }
  impl_->queue.stop();
  impl_->backend.reset();
}

Ticket Transfers::read(const std::shared_ptr<const Region>& region, std::uint64_t offset, void* memory,
                       std::size_t bytes) {
  return impl_->start(region, false, offset, static_cast<char*>(memory), bytes);
}

Ticket Transfers::write(const std::shared_ptr<const Region>& region, std::uint64_t offset, const void* memory,
                        std::size_t bytes) {
  // Only read from: a request has one kind of pointer for both directions.
  return impl_->start(region, true, offset, static_cast<char*>(const_cast<void*>(memory)), bytes);
}

bool Transfers::done(Ticket ticket) {
  impl_->check_process();
  return impl_->queue.done(ticket);
}
void Transfers::wait(Ticket ticket) {
  impl_->check_process();
  impl_->queue.wait(ticket);
}
void Transfers::synchronize() {
  impl_->check_process();
  impl_->queue.synchronize();
}
void Transfers::check() {
  impl_->check_process();
  impl_->queue.check();
}

bool Transfers::register_memory(void* memory, std::size_t bytes) {
  impl_->check_process();
  return impl_->backend->register_memory(memory, bytes);
}
void Transfers::unregister_memory(void* memory) {
  impl_->check_process();
  impl_->backend->unregister_memory(memory);
}

void Transfers::observe(std::function<void(const TransferSpan&)> observer) {
  impl_->queue.observe(std::move(observer));
}

const char* Transfers::backend() const {
  return impl_->name;
}
std::size_t Transfers::block_bytes() const {
  return impl_->options.block_bytes;
}
std::size_t Transfers::queue_depth() const {
  return impl_->depth;
}
Transfers::Counters Transfers::counters() const {
  return impl_->queue.counters();
}

std::string Transfers::describe() const {
  return std::string(impl_->name) + " (" + impl_->reason + "): " + impl_->backend->describe() + "; blocks of " +
         io::size_text(impl_->options.block_bytes) + ", " + std::to_string(impl_->depth) +
         " requests in flight per drive";
}

std::string why_no_io_uring() {
  io::SystemCalls calls;
  try {
    const io::Uring ring(calls, 2);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace slidecore
