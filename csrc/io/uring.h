#pragma once
// A bare io_uring: its file descriptor, its two rings, and nothing about what the requests mean. Used by one thread.

#include <cstdint>
#include <string>

#include "io/system_calls.h"
#include "io/uring_abi.h"

namespace slidecore::io {

class Uring {
 public:
  // Room for `entries` requests that are prepared or in flight. Throws Error(unsupported), which says why.
  Uring(SystemCalls& calls, unsigned entries);
  ~Uring();
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;

  // A zeroed request; it is handed to the kernel by the next enter(). Null if all entries are taken.
  abi::Sqe* prepare();
  unsigned prepared() const;  // not yet taken by the kernel
  // Takes back what the kernel has not taken, the last first; its user_data.
  std::uint64_t withdraw();
  // Hands over what is prepared and waits for `complete` completions. Returns 0 or -errno.
  int enter(unsigned complete);
  // Calls body(user_data, result) for each completion that is there. Returns their number.
  template <class Body>
  unsigned reap(const Body& body) {
    unsigned head = *cq_head_, count = 0;
    for (; head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE); ++count) {
      const abi::Cqe cqe = cqes_[head & cq_mask_];
      __atomic_store_n(cq_head_, ++head, __ATOMIC_RELEASE);
      body(cqe.user_data, cqe.result);
    }
    return count;
  }
  int enroll(unsigned opcode, void* argument, unsigned count);  // io_uring_register

  const std::string& features() const { return features_; }

 private:
  int set_up(unsigned entries);
  int map_rings();
  void check_operations();
  void close() noexcept;

  SystemCalls& calls_;
  abi::Params params_{};
  std::string features_;
  int fd_ = -1;
  void* rings_ = nullptr;
  std::size_t rings_bytes_ = 0;
  abi::Sqe* sqes_ = nullptr;
  std::size_t sqes_bytes_ = 0;
  unsigned *sq_head_ = nullptr, *sq_tail_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0;
  unsigned tail_ = 0;  // of the submission ring, before the kernel sees it
  const abi::Cqe* cqes_ = nullptr;
};

}  // namespace slidecore::io
