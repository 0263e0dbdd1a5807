#include "io/uring.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <memory>
#include <thread>

#include "io/errors.h"
#include "slidecore/status.h"

namespace slidecore::io {
namespace {

static_assert(std::endian::native == std::endian::little, "fields of 16 bits in words of 32 are taken as they lie");

constexpr int kAttempts = 30;

std::string why(int code) {
  switch (-code) {
    case ENOSYS:
      return "this kernel has no io_uring, or the container hides it (Linux 5.6 or newer is needed)";
    case EPERM:
    case EACCES: {
      int disabled = 0;
      std::ifstream("/proc/sys/kernel/io_uring_disabled") >> disabled;
      if (disabled != 0) {
        return "it is switched off (sysctl kernel.io_uring_disabled=" + std::to_string(disabled) + "; 0 allows it)";
      }
      return "a security policy forbids it, as containers' default seccomp profiles do (run the container with a "
             "profile that allows io_uring_setup, io_uring_enter and io_uring_register)";
    }
    case ENOMEM: {
      rlimit limit{};
      getrlimit(RLIMIT_MEMLOCK, &limit);
      return "the memory lock limit is too low (`ulimit -l`, now " + std::to_string(limit.rlim_cur / 1024) + " KiB)";
    }
    default:
      return "setting it up failed: " + errno_text(code);
  }
}

template <class T>
T* at(void* base, std::uint32_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

}  // namespace

Uring::Uring(SystemCalls& calls, unsigned entries) : calls_(calls) {
  int code = set_up(std::bit_ceil(std::max(entries, 2u)));
  if (code >= 0) code = map_rings();
  if (code < 0) {
    close();
    throw Error(Code::unsupported, "io_uring cannot be used: " + why(code));
  }
  try {
    check_operations();
  } catch (...) {
    close();
    throw;
  }
}

Uring::~Uring() {
  close();
}

// With SINGLE_ISSUER and DEFER_TASKRUN completions are worked on when this thread asks for them, and interrupt nobody.
int Uring::set_up(unsigned entries) {
  struct Mode {
    std::uint32_t flags;
    const char* name;
  };
  constexpr Mode kModes[] = {{abi::kSingleIssuer | abi::kDeferTaskrun, "SINGLE_ISSUER and DEFER_TASKRUN"},
                             {abi::kCoopTaskrun, "COOP_TASKRUN"},
                             {0, "plain"}};
  for (const Mode& mode : kModes) {
    features_ = mode.name;
    // A ring's memory counts against the user's lock limit until the kernel gets round to freeing it, a while after the
    // ring was closed: a limit that is low may be met by a ring that is gone in a moment.
    for (int attempt = 0;; ++attempt) {
      params_ = abi::Params{};
      params_.flags = mode.flags;
      fd_ = calls_.uring_setup(entries, &params_);
      if (fd_ != -ENOMEM || attempt == kAttempts) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    if (fd_ != -EINVAL) break;  // EINVAL: an older kernel does not know the flags
  }
  return fd_;
}

int Uring::map_rings() {
  if ((params_.features & abi::kFeatureSingleMmap) == 0) return -ENOSYS;  // older than 5.4
  rings_bytes_ = std::max(params_.sq.array + params_.sq_entries * sizeof(std::uint32_t),
                          params_.cq.cqes + params_.cq_entries * sizeof(abi::Cqe));
  void* mapped = nullptr;
  if (const int code = calls_.uring_map(fd_, rings_bytes_, abi::kOffsetRings, &mapped); code < 0) return code;
  rings_ = mapped;
  sqes_bytes_ = params_.sq_entries * sizeof(abi::Sqe);
  if (const int code = calls_.uring_map(fd_, sqes_bytes_, abi::kOffsetSqes, &mapped); code < 0) return code;
  sqes_ = static_cast<abi::Sqe*>(mapped);
  sq_head_ = at<unsigned>(rings_, params_.sq.head);
  sq_tail_ = at<unsigned>(rings_, params_.sq.tail);
  sq_mask_ = *at<unsigned>(rings_, params_.sq.ring_mask);
  cq_head_ = at<unsigned>(rings_, params_.cq.head);
  cq_tail_ = at<unsigned>(rings_, params_.cq.tail);
  cq_mask_ = *at<unsigned>(rings_, params_.cq.ring_mask);
  cqes_ = at<abi::Cqe>(rings_, params_.cq.cqes);
  // Entry i of the ring is request i, always.
  auto* array = at<unsigned>(rings_, params_.sq.array);
  for (unsigned i = 0; i < params_.sq_entries; ++i) array[i] = i;
  tail_ = *sq_tail_;
  return 0;
}

void Uring::check_operations() {
  const auto probe = std::make_unique<abi::Probe>();
  const int code = enroll(abi::kRegisterProbe, probe.get(), 256);
  const auto has = [&](std::uint8_t op) { return (probe->ops[op].flags & abi::kOpSupported) != 0; };
  if (code < 0 || !has(abi::kRead) || !has(abi::kWrite) || !has(abi::kPollAdd) || !has(abi::kTimeout)) {
    throw Error(Code::unsupported,
                "io_uring cannot be used: this kernel's lacks operations (Linux 5.6 or newer is needed)");
  }
}

abi::Sqe* Uring::prepare() {
  if (prepared() == params_.sq_entries) return nullptr;
  abi::Sqe* sqe = &sqes_[tail_++ & sq_mask_];
  *sqe = abi::Sqe{};
  return sqe;
}

unsigned Uring::prepared() const {
  return tail_ - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
}

std::uint64_t Uring::withdraw() {
  const std::uint64_t user_data = sqes_[--tail_ & sq_mask_].user_data;
  __atomic_store_n(sq_tail_, tail_, __ATOMIC_RELEASE);
  return user_data;
}

int Uring::enter(unsigned complete) {
  __atomic_store_n(sq_tail_, tail_, __ATOMIC_RELEASE);
  const int code = calls_.uring_enter(fd_, prepared(), complete, abi::kGetEvents);
  return std::min(code, 0);
}

int Uring::enroll(unsigned opcode, void* argument, unsigned count) {
  return calls_.uring_register(fd_, opcode, argument, count);
}

void Uring::close() noexcept {
  if (sqes_ != nullptr) ::munmap(sqes_, sqes_bytes_);
  if (rings_ != nullptr) ::munmap(rings_, rings_bytes_);
  if (fd_ >= 0) calls_.close(fd_);
}

}  // namespace slidecore::io
