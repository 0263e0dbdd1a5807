#include "slidecore/device.h"

#include "slidecore/status.h"

namespace slidecore {

const DeviceOps& ops_by_name(const std::string& name) {
  if (name == "host") return host_ops();
  if (name == "cuda") return cuda_ops();
  if (name == "hip") return hip_ops();
  throw Error(Code::invalid_argument, "no device backend \"" + name + "\"; there are host, cuda and hip");
}

Device::Device(const DeviceOps& ops, int ordinal) : ops_(&ops), ordinal_(ordinal) {
  // A table may come from another build: what is called must be there.
  if (ops.version != kDeviceOpsVersion || ops.struct_size < sizeof(DeviceOps)) {
    throw Error(Code::unsupported, "device backend table has version " + std::to_string(ops.version) + " and " +
                                       std::to_string(ops.struct_size) + " bytes; needed are version " +
                                       std::to_string(kDeviceOpsVersion) + " and " + std::to_string(sizeof(DeviceOps)) +
                                       " bytes");
  }
  check(ops_->open(ordinal, &ctx_), "open");
  try {
    check(ops_->describe(ctx_, &info_), "describe");
  } catch (...) {
    ops_->close(ctx_);
    throw;
  }
}

Device::~Device() {
  // Nobody is left to tell, and the context is gone either way.
  if (ctx_ != nullptr) static_cast<void>(ops_->close(ctx_));
}

void Device::check(int code, const char* what) const {
  if (code == 0) return;
  throw Error(code == kDeviceOutOfMemory ? Code::out_of_memory : Code::device,
              std::string(what) + " on " + ops_->name + " device " + std::to_string(ordinal_) +
                  " failed: " + ops_->last_error() + " (code " + std::to_string(code) + ")");
}

void Device::bind_thread() const {
  check(ops_->bind_thread(ctx_), "bind_thread");
}

void* Device::alloc(std::size_t bytes) const {
  void* pointer = nullptr;
  const int code = ops_->alloc(ctx_, bytes, &pointer);
  if (code != 0) check(code, ("alloc of " + std::to_string(bytes) + " bytes").c_str());
  return pointer;
}

void Device::free(void* pointer) const {
  check(ops_->free(ctx_, pointer), "free");
}

Device::MemoryInUse Device::memory_in_use() const {
  MemoryInUse use{};
  check(ops_->memory_in_use(ctx_, &use.now, &use.peak), "memory_in_use");
  return use;
}

void Device::register_host(void* pointer, std::size_t bytes) const {
  const int code = ops_->register_host(ctx_, pointer, bytes);
  if (code != 0) check(code, ("register_host of " + std::to_string(bytes) + " bytes").c_str());
}

void Device::unregister_host(void* pointer) const {
  check(ops_->unregister_host(ctx_, pointer), "unregister_host");
}

StreamHandle Device::create_stream() const {
  StreamHandle stream = 0;
  check(ops_->stream_create(ctx_, &stream), "stream_create");
  return stream;
}

void Device::destroy_stream(StreamHandle stream) const {
  check(ops_->stream_destroy(ctx_, stream), "stream_destroy");
}

void Device::synchronize(StreamHandle stream) const {
  check(ops_->stream_synchronize(ctx_, stream), "stream_synchronize");
}

void Device::wait(StreamHandle stream, EventHandle event) const {
  check(ops_->stream_wait_event(ctx_, stream, event), "stream_wait_event");
}

EventHandle Device::create_event(bool timing) const {
  EventHandle event = 0;
  check(ops_->event_create(ctx_, timing ? 1 : 0, &event), "event_create");
  return event;
}

void Device::destroy_event(EventHandle event) const {
  check(ops_->event_destroy(ctx_, event), "event_destroy");
}

void Device::record(EventHandle event, StreamHandle stream) const {
  check(ops_->event_record(ctx_, event, stream), "event_record");
}

bool Device::done(EventHandle event) const {
  int done = 0;
  check(ops_->event_query(ctx_, event, &done), "event_query");
  return done != 0;
}

void Device::synchronize_event(EventHandle event) const {
  check(ops_->event_synchronize(ctx_, event), "event_synchronize");
}

double Device::elapsed_ms(EventHandle start, EventHandle end) const {
  double ms = 0;
  check(ops_->event_elapsed_ms(ctx_, start, end, &ms), "event_elapsed_ms");
  return ms;
}

void Device::to_device(void* device, const void* host, std::size_t bytes, StreamHandle stream) const {
  const int code = ops_->copy_to_device(ctx_, device, host, bytes, stream);
  if (code != 0) check(code, ("copy_to_device of " + std::to_string(bytes) + " bytes").c_str());
}

void Device::to_host(void* host, const void* device, std::size_t bytes, StreamHandle stream) const {
  const int code = ops_->copy_to_host(ctx_, host, device, bytes, stream);
  if (code != 0) check(code, ("copy_to_host of " + std::to_string(bytes) + " bytes").c_str());
}

}  // namespace slidecore
