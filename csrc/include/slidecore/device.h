#pragma once
// Devices behind one versioned table of functions. Backends: host (threads), cuda and hip (driver libraries
// loaded at run time: building needs no toolkit, running needs no card for the host backend).

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace slidecore {

// Opaque handles: CUstream / hipStream_t / host stream. Stream 0 is the framework's default stream; on the host
// backend it is the calling thread itself, so work "enqueued" there is done before the call returns.
using StreamHandle = std::uintptr_t;
using EventHandle = std::uintptr_t;

inline constexpr std::uint32_t kDeviceOpsVersion = 1;
inline constexpr int kDeviceOutOfMemory = 2;  // the one code every backend shares: CUDA's and HIP's number for it

struct DeviceInfo {
  char name[128];
  std::uint64_t total_bytes;  // device memory; 0 where the backend has none of its own (host)
  std::int32_t numa_node;     // memory node of the card, -1 if unknown
  std::uint32_t reserved;
};

enum DeviceFlags : std::uint32_t {
  kDeviceIsHost = 1u << 0,        // device pointers are host pointers
  kDeviceNeedsPinning = 1u << 1,  // asynchronous copies need registered host memory
};

// Every function returns 0 or a nonzero code; the reason is then in last_error() of the same thread.
// `ctx` comes from open() and may be used from any thread. bind_thread() makes the device current on the calling
// thread for good: worker threads call it once, which makes their calls cheaper. Without it a call makes the
// device current and afterwards restores what the framework had set. alloc() of 0 bytes fails, free(nullptr) and
// copies of 0 bytes do nothing.
struct DeviceOps {
  std::uint32_t version;
  std::uint32_t struct_size;
  const char* name;
  std::uint32_t flags;
  std::uint32_t reserved;

  const char* (*last_error)();
  int (*device_count)(int* count);
  int (*open)(int ordinal, void** ctx);
  int (*close)(void* ctx);
  int (*describe)(void* ctx, DeviceInfo* info);
  int (*bind_thread)(void* ctx);

  int (*alloc)(void* ctx, std::size_t bytes, void** pointer);
  int (*free)(void* ctx, void* pointer);
  int (*memory_in_use)(void* ctx, std::uint64_t* now, std::uint64_t* peak);  // of alloc(), by this ctx
  int (*register_host)(void* ctx, void* pointer, std::size_t bytes);
  int (*unregister_host)(void* ctx, void* pointer);

  int (*stream_create)(void* ctx, StreamHandle* stream);  // non-blocking
  int (*stream_destroy)(void* ctx, StreamHandle stream);
  int (*stream_synchronize)(void* ctx, StreamHandle stream);
  int (*stream_wait_event)(void* ctx, StreamHandle stream, EventHandle event);

  int (*event_create)(void* ctx, int timing, EventHandle* event);
  int (*event_destroy)(void* ctx, EventHandle event);
  int (*event_record)(void* ctx, EventHandle event, StreamHandle stream);
  int (*event_query)(void* ctx, EventHandle event, int* done);
  int (*event_synchronize)(void* ctx, EventHandle event);                              // sleeps, does not spin
  int (*event_elapsed_ms)(void* ctx, EventHandle start, EventHandle end, double* ms);  // both created with timing

  int (*copy_to_device)(void* ctx, void* device, const void* host, std::size_t bytes, StreamHandle stream);
  int (*copy_to_host)(void* ctx, void* host, const void* device, std::size_t bytes, StreamHandle stream);
};

// The backend tables. cuda_ops() and hip_ops() load the driver library on first use and throw
// Error(unsupported) with every missing library or symbol named; they never run at load time of this library.
const DeviceOps& host_ops();
const DeviceOps& cuda_ops();
const DeviceOps& hip_ops();
const DeviceOps& ops_by_name(const std::string& name);  // "host" | "cuda" | "hip", else Error(invalid_argument)

// Owns one opened device. Methods throw Error(device | out_of_memory) naming the call, the device and the reason.
// Neither copied nor moved (share it by shared_ptr); all methods are thread-safe. Streams and events must be
// destroyed before the Device.
class Device {
 public:
  Device(const DeviceOps& ops, int ordinal);
  Device(const std::string& backend, int ordinal) : Device(ops_by_name(backend), ordinal) {}
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const DeviceOps& ops() const { return *ops_; }
  const DeviceInfo& info() const { return info_; }
  int ordinal() const { return ordinal_; }
  bool is_host() const { return (ops_->flags & kDeviceIsHost) != 0; }
  bool needs_pinning() const { return (ops_->flags & kDeviceNeedsPinning) != 0; }

  void bind_thread() const;
  void* alloc(std::size_t bytes) const;
  void free(void* pointer) const;
  struct MemoryInUse {
    std::uint64_t now, peak;
  };
  MemoryInUse memory_in_use() const;
  void register_host(void* pointer, std::size_t bytes) const;
  void unregister_host(void* pointer) const;

  StreamHandle create_stream() const;
  void destroy_stream(StreamHandle stream) const;
  void synchronize(StreamHandle stream) const;
  void wait(StreamHandle stream, EventHandle event) const;

  EventHandle create_event(bool timing = false) const;
  void destroy_event(EventHandle event) const;
  void record(EventHandle event, StreamHandle stream) const;
  bool done(EventHandle event) const;
  void synchronize_event(EventHandle event) const;
  double elapsed_ms(EventHandle start, EventHandle end) const;

  void to_device(void* device, const void* host, std::size_t bytes, StreamHandle stream) const;
  void to_host(void* host, const void* device, std::size_t bytes, StreamHandle stream) const;

 private:
  void check(int code, const char* what) const;
  const DeviceOps* ops_;
  int ordinal_;
  void* ctx_ = nullptr;
  DeviceInfo info_{};
};

}  // namespace slidecore
