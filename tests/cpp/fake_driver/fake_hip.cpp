#include "fake_driver.h"

namespace {

thread_local int last = 0;  // of hipGetLastError: set by any failure, "not ready" included

int remember(int code) {
  if (code != 0) last = code;
  return code;
}

int current_device() {
  return fake::current < 0 ? 0 : fake::current;
}

}  // namespace

#define ENTER() \
  if (const int code = fake::enter(__func__, false, false); code != 0) return remember(code)

FAKE_EXPORT int hipInit(unsigned flags) {
  ENTER();
  return remember(flags == 0 ? fake::init() : fake::kInvalidValue);
}
FAKE_EXPORT const char* hipGetErrorName(int code) {
  return fake::error_name(code);
}
FAKE_EXPORT const char* hipGetErrorString(int) {
  return "the fake driver's description";
}
FAKE_EXPORT int hipGetLastError() {
  const int code = last;
  last = 0;
  return code;
}
FAKE_EXPORT int hipGetDeviceCount(int* count) {
  ENTER();
  *count = fake::kDevices;
  return 0;
}
FAKE_EXPORT int hipDeviceGet(int* device, int ordinal) {
  ENTER();
  return remember(fake::device(device, ordinal));
}
FAKE_EXPORT int hipDeviceGetName(char* name, int length, int device) {
  ENTER();
  return remember(fake::device_name(name, length, device));
}
FAKE_EXPORT int hipDeviceTotalMem(std::size_t* bytes, int) {
  ENTER();
  *bytes = fake::kCapacity;
  return 0;
}
FAKE_EXPORT int hipDeviceGetPCIBusId(char* id, int length, int ordinal) {
  ENTER();
  return remember(fake::pci_id(id, length, ordinal));
}
FAKE_EXPORT int hipGetDevice(int* ordinal) {
  ENTER();
  *ordinal = current_device();
  return 0;
}
FAKE_EXPORT int hipSetDevice(int ordinal) {
  ENTER();
  return remember(fake::device(&fake::current, ordinal));
}
FAKE_EXPORT int hipMemGetInfo(std::size_t* free_bytes, std::size_t* total) {
  ENTER();
  return remember(fake::memory_info(free_bytes, total));
}
FAKE_EXPORT int hipMalloc(void** pointer, std::size_t bytes) {
  ENTER();
  std::uintptr_t address = 0;
  const int code = fake::alloc(&address, bytes);
  if (code == 0) *pointer = reinterpret_cast<void*>(address);
  return remember(code);
}
FAKE_EXPORT int hipFree(void* pointer) {
  ENTER();
  return remember(fake::free(reinterpret_cast<std::uintptr_t>(pointer)));
}
FAKE_EXPORT int hipHostRegister(void* host, std::size_t bytes, unsigned flags) {
  ENTER();
  return remember(fake::register_host(host, bytes, flags));
}
FAKE_EXPORT int hipHostUnregister(void* host) {
  ENTER();
  return remember(fake::unregister_host(host));
}
#ifndef FAKE_INCOMPLETE
FAKE_EXPORT int hipStreamCreateWithFlags(void** stream, unsigned flags) {
  ENTER();
  return remember(fake::stream_create(__func__, stream, flags));
}
FAKE_EXPORT int hipStreamDestroy(void* stream) {
  ENTER();
  return remember(fake::stream_destroy(stream));
}
#endif
FAKE_EXPORT int hipStreamSynchronize(void* stream) {
  ENTER();
  return remember(fake::stream_synchronize(stream));
}
FAKE_EXPORT int hipStreamWaitEvent(void* stream, void* event, unsigned flags) {
  ENTER();
  return remember(fake::stream_wait_event(stream, event, flags));
}
FAKE_EXPORT int hipEventCreateWithFlags(void** event, unsigned flags) {
  ENTER();
  return remember(fake::event_create(__func__, event, flags));
}
FAKE_EXPORT int hipEventDestroy(void* event) {
  ENTER();
  return remember(fake::event_destroy(event));
}
FAKE_EXPORT int hipEventRecord(void* event, void* stream) {
  ENTER();
  return remember(fake::event_record(event, stream));
}
FAKE_EXPORT int hipEventQuery(void* event) {
  ENTER();
  return remember(fake::event_check(event));
}
FAKE_EXPORT int hipEventSynchronize(void* event) {
  ENTER();
  return remember(fake::event_check(event));
}
FAKE_EXPORT int hipEventElapsedTime(float* ms, void* start, void* end) {
  ENTER();
  return remember(fake::event_elapsed(ms, start, end));
}
FAKE_EXPORT int hipMemcpyHtoDAsync(void* device, const void* host, std::size_t bytes, void* stream) {
  ENTER();
  return remember(fake::copy(device, host, reinterpret_cast<std::uintptr_t>(device), bytes, stream));
}
FAKE_EXPORT int hipMemcpyDtoHAsync(void* host, void* device, std::size_t bytes, void* stream) {
  ENTER();
  return remember(fake::copy(host, device, reinterpret_cast<std::uintptr_t>(device), bytes, stream));
}
