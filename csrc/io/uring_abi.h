#pragma once
// What the kernel and a process share through io_uring (io_uring_setup(2), io_uring_enter(2), io_uring_register(2)),
// declared here so that building needs no recent kernel headers. The layout is the kernel's promise; the assertions
// pin ours to it.

#include <cstddef>
#include <cstdint>

namespace slidecore::io::abi {

struct Sqe {
  std::uint8_t opcode;
  std::uint8_t flags;
  std::uint16_t ioprio;
  std::int32_t fd;  // or an index of the registered files
  std::uint64_t offset;
  std::uint64_t address;
  std::uint32_t length;
  std::uint32_t op_flags;
  std::uint64_t user_data;
  std::uint16_t buffer_index;
  std::uint16_t personality;
  std::int32_t file_index;
  std::uint64_t address3;
  std::uint64_t unused;
};
static_assert(sizeof(Sqe) == 64);
static_assert(offsetof(Sqe, fd) == 4 && offsetof(Sqe, offset) == 8 && offsetof(Sqe, address) == 16);
static_assert(offsetof(Sqe, length) == 24 && offsetof(Sqe, op_flags) == 28 && offsetof(Sqe, user_data) == 32);
static_assert(offsetof(Sqe, buffer_index) == 40 && offsetof(Sqe, file_index) == 44 && offsetof(Sqe, address3) == 48);

struct Cqe {
  std::uint64_t user_data;
  std::int32_t result;
  std::uint32_t flags;
};
static_assert(sizeof(Cqe) == 16 && offsetof(Cqe, result) == 8 && offsetof(Cqe, flags) == 12);

struct SubmissionOffsets {
  std::uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
  std::uint64_t user_address;
};
static_assert(sizeof(SubmissionOffsets) == 40 && offsetof(SubmissionOffsets, array) == 24);

struct CompletionOffsets {
  std::uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
  std::uint64_t user_address;
};
static_assert(sizeof(CompletionOffsets) == 40 && offsetof(CompletionOffsets, cqes) == 20);

struct Params {
  std::uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, reserved[3];
  SubmissionOffsets sq;
  CompletionOffsets cq;
};
static_assert(sizeof(Params) == 120 && offsetof(Params, features) == 20);
static_assert(offsetof(Params, sq) == 40 && offsetof(Params, cq) == 80);

struct ProbeOp {
  std::uint8_t op, reserved;
  std::uint16_t flags;
  std::uint32_t reserved2;
};
struct Probe {
  std::uint8_t last_op, ops_length;
  std::uint16_t reserved;
  std::uint32_t reserved2[3];
  ProbeOp ops[256];
};
static_assert(sizeof(ProbeOp) == 8 && offsetof(ProbeOp, flags) == 2 && offsetof(Probe, ops) == 16);

struct ResourceRegister {
  std::uint32_t count, flags;
  std::uint64_t reserved, data, tags;
};
static_assert(sizeof(ResourceRegister) == 32 && offsetof(ResourceRegister, data) == 16);

struct ResourceUpdate {
  std::uint32_t offset, reserved;
  std::uint64_t data, tags;
  std::uint32_t count, reserved2;
};
static_assert(sizeof(ResourceUpdate) == 32 && offsetof(ResourceUpdate, data) == 8);
static_assert(offsetof(ResourceUpdate, count) == 24);

struct Timespec {  // struct __kernel_timespec: 64 bits each, on every architecture
  std::int64_t seconds, nanoseconds;
};
static_assert(sizeof(Timespec) == 16);

inline constexpr std::uint8_t kReadFixed = 4, kWriteFixed = 5, kPollAdd = 6, kTimeout = 11, kRead = 22, kWrite = 23;
inline constexpr std::uint8_t kFixedFile = 1u << 0;  // Sqe::flags

inline constexpr std::uint32_t kCoopTaskrun = 1u << 8;    // Linux 5.19
inline constexpr std::uint32_t kSingleIssuer = 1u << 12;  // Linux 6.0
inline constexpr std::uint32_t kDeferTaskrun = 1u << 13;  // Linux 6.1
inline constexpr std::uint32_t kFeatureSingleMmap = 1u << 0;
inline constexpr std::uint32_t kGetEvents = 1u << 0;    // io_uring_enter
inline constexpr std::uint16_t kOpSupported = 1u << 0;  // ProbeOp::flags
inline constexpr std::uint32_t kSparse = 1u << 0;       // ResourceRegister::flags, Linux 5.19

inline constexpr std::uint64_t kOffsetRings = 0, kOffsetSqes = 0x10000000;

inline constexpr unsigned kUnregisterBuffers = 1, kRegisterFiles = 2, kUnregisterFiles = 3, kRegisterProbe = 8,
                          kRegisterBuffers2 = 15, kUpdateBuffers = 16;

}  // namespace slidecore::io::abi
