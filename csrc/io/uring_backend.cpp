// io_uring, driven by one thread: it alone prepares, submits and reaps, as SINGLE_ISSUER demands. An eventfd in the
// ring wakes it when work comes.

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "io/backend.h"
#include "io/errors.h"
#include "io/registered_buffers.h"
#include "io/uring.h"
#include "slidecore/status.h"

namespace slidecore::io {
namespace {

using Clock = Execution::Clock;

constexpr std::uint64_t kWakeData = ~std::uint64_t{0}, kTimerData = kWakeData - 1;

class UringBackend final : public Backend {
 public:
  UringBackend(const Storage::Impl& storage, WorkQueue& queue, const BackendSettings& settings);
  ~UringBackend() override;

  std::string describe() const override;
  bool register_memory(void* memory, std::size_t bytes) override;
  void unregister_memory(void* memory) override;

 private:
  struct Slot {
    Slot(const Storage::Impl& storage, const BackendSettings& settings) : execution(storage, settings.patience_s) {}
    Execution execution;
    Clock::time_point due;
  };

  // The thread's.
  void work(std::promise<void>& ready);
  void loop();
  void start_pieces();
  void start_due();
  void request(std::uint32_t number);
  void completed(std::uint64_t user_data, long result);
  void return_slot(std::uint32_t number);
  void give_up(std::uint32_t number, std::exception_ptr error);
  void give_up_waiting();
  void arm();
  void enter();
  void drain(std::exception_ptr error);
  void run_commands();

  bool command(std::function<bool()> run);

  const Storage::Impl& storage_;
  WorkQueue& queue_;
  const BackendSettings settings_;
  int wake_fd_ = -1;

  std::unique_ptr<Uring> ring_;
  std::unique_ptr<RegisteredBuffers> buffers_;
  bool fixed_files_ = false;
  std::deque<Slot> slots_;
  std::vector<std::uint32_t> free_slots_;
  std::vector<std::uint32_t> later_;  // slots that wait until they are due
  std::vector<std::size_t> busy_;     // slots in use, for each drive
  std::size_t in_kernel_ = 0;         // requests prepared or handed over, and not completed
  bool wake_armed_ = false, timer_armed_ = false;
  abi::Timespec timer_{};
  Clock::time_point last_entered_;  // enter() last succeeded

  mutable std::mutex mutex_;
  std::vector<std::packaged_task<bool()>> commands_;
  bool ended_ = false;  // no command will be run any more
  std::string features_;

  std::thread thread_;
};

UringBackend::UringBackend(const Storage::Impl& storage, WorkQueue& queue, const BackendSettings& settings)
    : storage_(storage), queue_(queue), settings_(settings), busy_(storage.files.size()) {
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_fd_ < 0) throw Error(Code::unsupported, "io_uring cannot be used: eventfd: " + errno_text(errno));
  const std::size_t slots = settings.queue_depth * storage.files.size();
  for (std::size_t i = 0; i < slots; ++i) {
    slots_.emplace_back(storage, settings);
    free_slots_.push_back(static_cast<std::uint32_t>(i));
  }
  std::promise<void> ready;
  std::future<void> set_up = ready.get_future();
  try {
    thread_ = std::thread([this, &ready] { work(ready); });
    set_up.get();
  } catch (const std::exception& error) {
    if (thread_.joinable()) thread_.join();
    ::close(wake_fd_);
    if (dynamic_cast<const Error*>(&error) != nullptr) throw;
    throw Error(Code::unsupported, std::string("io_uring cannot be used: ") + error.what());
  }
  queue_.set_wake([this] { eventfd_write(wake_fd_, 1); });
}

UringBackend::~UringBackend() {
  thread_.join();
  queue_.set_wake(nullptr);
  ::close(wake_fd_);
}

std::string UringBackend::describe() const {
  const std::lock_guard lock(mutex_);
  std::string text = features_;
  if (buffers_ != nullptr && !buffers_->why_not().empty()) text += ", no registered buffers: " + buffers_->why_not();
  return text;
}

void UringBackend::work(std::promise<void>& ready) {
  pthread_setname_np(pthread_self(), "slidecore-io");
  try {
    ring_ = std::make_unique<Uring>(*storage_.calls, static_cast<unsigned>(slots_.size() + 2));
    std::vector<int> files;
    for (const auto& file : storage_.files) files.push_back(file->fd());
    fixed_files_ = ring_->enroll(abi::kRegisterFiles, files.data(), static_cast<unsigned>(files.size())) >= 0;
    buffers_ = std::make_unique<RegisteredBuffers>(*ring_, *storage_.calls);
    features_ = ring_->features() + (fixed_files_ ? ", registered files" : ", no registered files");
  } catch (...) {
    ring_.reset();
    ready.set_exception(std::current_exception());
    return;
  }
  ready.set_value();
  last_entered_ = Clock::now();
  try {
    loop();
  } catch (...) {
    drain(std::current_exception());
  }
  {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    commands_.clear();  // whoever waits for one gets std::future_error
    buffers_.reset();
  }
  // The kernel takes a ring down later and by itself; files and pages are to be free now.
  ring_->enroll(abi::kUnregisterBuffers, nullptr, 0);
  ring_->enroll(abi::kUnregisterFiles, nullptr, 0);
  ring_.reset();
}

void UringBackend::loop() {
  for (;;) {
    queue_.expect_wake();
    run_commands();
    start_due();
    start_pieces();
    if (queue_.abandoned()) give_up_waiting();
    if (queue_.stopping() && in_kernel_ == 0) return;
    arm();
    enter();
    ring_->reap([this](std::uint64_t user_data, long result) { completed(user_data, result); });
  }
}

void UringBackend::start_pieces() {
  for (std::uint32_t drive = 0; drive < busy_.size(); ++drive) {
    while (busy_[drive] < settings_.queue_depth) {
      const auto piece = queue_.try_take(drive);
      if (!piece) break;
      const std::uint32_t number = free_slots_.back();
      free_slots_.pop_back();
      ++busy_[drive];
      try {
        slots_[number].execution.begin(*piece);
      } catch (...) {
        return_slot(number);
        queue_.failed(*piece, std::current_exception());
        continue;
      }
      request(number);
    }
  }
}

void UringBackend::start_due() {
  const Clock::time_point now = Clock::now();
  const auto rest = std::partition(later_.begin(), later_.end(), [&](auto number) { return slots_[number].due > now; });
  const std::vector<std::uint32_t> due(rest, later_.end());
  later_.erase(rest, later_.end());
  for (const std::uint32_t number : due) request(number);
}

void UringBackend::request(std::uint32_t number) {
  const Execution& execution = slots_[number].execution;
  const Request request = execution.request();
  const std::uint32_t drive = execution.piece().drive;
  const auto buffer = buffers_->find(request.memory, request.bytes);
  abi::Sqe* sqe = ring_->prepare();  // there is room: a slot has one request at most
  if (buffer) {
    sqe->opcode = request.write ? abi::kWriteFixed : abi::kReadFixed;
    sqe->buffer_index = *buffer;
  } else {
    sqe->opcode = request.write ? abi::kWrite : abi::kRead;
  }
  sqe->flags = fixed_files_ ? abi::kFixedFile : 0;
  sqe->fd = fixed_files_ ? static_cast<int>(drive) : storage_.files[drive]->fd();
  sqe->offset = request.offset;
  sqe->address = reinterpret_cast<std::uintptr_t>(request.memory);
  sqe->length = static_cast<std::uint32_t>(request.bytes);
  sqe->user_data = number;
  ++in_kernel_;
}

void UringBackend::completed(std::uint64_t user_data, long result) {
  if (user_data == kWakeData) {
    wake_armed_ = false;
    eventfd_t count = 0;
    eventfd_read(wake_fd_, &count);
    return;
  }
  if (user_data == kTimerData) {
    timer_armed_ = false;
    return;
  }
  --in_kernel_;
  const auto number = static_cast<std::uint32_t>(user_data);
  Execution& execution = slots_[number].execution;
  const Request made = execution.request();
  try {
    switch (execution.complete(storage_.calls->uring_result(made.write, made.offset, made.bytes, result))) {
      case Execution::Next::request:
        slots_[number].due = Clock::time_point{};
        break;
      case Execution::Next::request_later:
        slots_[number].due = Clock::now() + execution.delay();
        break;
      case Execution::Next::done: {
        const Piece piece = execution.piece();
        queue_.finished(piece, execution);
        return_slot(number);
        return;
      }
    }
    later_.push_back(number);
  } catch (...) {
    give_up(number, std::current_exception());
  }
}

void UringBackend::return_slot(std::uint32_t number) {
  --busy_[slots_[number].execution.piece().drive];
  free_slots_.push_back(number);
}

void UringBackend::give_up(std::uint32_t number, std::exception_ptr error) {
  const Piece piece = slots_[number].execution.piece();
  return_slot(number);
  queue_.failed(piece, std::move(error));
}

void UringBackend::give_up_waiting() {
  for (const std::uint32_t number : std::exchange(later_, {})) {
    give_up(number, std::make_exception_ptr(Error(Code::state, "the transfers are closed")));
  }
}

void UringBackend::arm() {
  if (!wake_armed_) {
    abi::Sqe* sqe = ring_->prepare();
    sqe->opcode = abi::kPollAdd;
    sqe->fd = wake_fd_;
    sqe->op_flags = POLLIN;
    sqe->user_data = kWakeData;
    wake_armed_ = true;
  }
  if (!later_.empty() && !timer_armed_) {
    Clock::time_point due = Clock::time_point::max();
    for (const std::uint32_t number : later_) due = std::min(due, slots_[number].due);
    const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(due - Clock::now()).count();
    timer_ = {0, std::clamp<std::int64_t>(left, 1'000, 100'000'000)};
    abi::Sqe* sqe = ring_->prepare();
    sqe->opcode = abi::kTimeout;
    sqe->address = reinterpret_cast<std::uintptr_t>(&timer_);
    sqe->length = 1;
    sqe->user_data = kTimerData;
    timer_armed_ = true;
  }
}

// Interruptions and shortages of the call itself are retried; requests that it did not take stay prepared.
void UringBackend::enter() {
  const int code = ring_->enter(1);
  if (code >= 0 || code == -EINTR) {
    last_entered_ = Clock::now();
    return;
  }
  const bool passing = code == -EAGAIN || code == -EBUSY || code == -ENOMEM;
  if (!passing || Clock::now() - last_entered_ > std::chrono::duration<double>(settings_.patience_s)) {
    throw Error(Code::io, "io_uring_enter failed with transfers of " + storage_.paths.front() +
                              " under way: " + errno_text(code));
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

// The ring has failed: takes back what the kernel has not seen, and waits for what it works on.
void UringBackend::drain(std::exception_ptr error) {
  while (ring_->prepared() > 0) {
    if (ring_->withdraw() < kTimerData) --in_kernel_;
  }
  const auto patience = std::chrono::duration<double>(settings_.patience_s);
  const Clock::time_point end = Clock::now() + std::chrono::duration_cast<Clock::duration>(patience);
  while (in_kernel_ > 0 && Clock::now() < end) {
    if (ring_->enter(1) < 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ring_->reap([this](std::uint64_t user_data, long) { in_kernel_ -= user_data < kTimerData ? 1 : 0; });
  }
  if (in_kernel_ > 0) {
    // A broken ring over a drive that does not answer. Bounce buffers must outlive the requests: they are left behind.
    static_cast<void>(new std::deque<Slot>(std::move(slots_)));
    error = std::make_exception_ptr(Error(Code::io, "io_uring failed and " + std::to_string(in_kernel_) +
                                                        " requests to " + storage_.paths.front() +
                                                        " have not ended: end this process, their memory is in use"));
  }
  queue_.broken(std::move(error));
}

void UringBackend::run_commands() {
  const std::lock_guard lock(mutex_);
  for (auto& command : std::exchange(commands_, {})) command();
}

bool UringBackend::command(std::function<bool()> run) {
  std::future<bool> answer;
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return false;
    answer = commands_.emplace_back(std::move(run)).get_future();
  }
  queue_.wake();
  try {
    return answer.get();
  } catch (const std::future_error&) {
    return false;  // the ring has ended
  }
}

bool UringBackend::register_memory(void* memory, std::size_t bytes) {
  return command([this, memory, bytes] { return buffers_->add(memory, bytes); });
}

void UringBackend::unregister_memory(void* memory) {
  command([this, memory] {
    buffers_->remove(memory);
    return true;
  });
}

}  // namespace

std::unique_ptr<Backend> make_uring_backend(const Storage::Impl& storage, WorkQueue& queue,
                                            const BackendSettings& settings) {
  return std::make_unique<UringBackend>(storage, queue, settings);
}

}  // namespace slidecore::io
