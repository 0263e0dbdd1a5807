#include "fake_driver.h"

namespace {

using Pointer = unsigned long long;

int contexts[fake::kDevices];  // a context is the address of its device's entry

}  // namespace

#define ENTER(needs_init, needs_current) \
  if (const int code = fake::enter(__func__, needs_init, needs_current); code != 0) return code

FAKE_EXPORT int cuInit(unsigned flags) {
  ENTER(false, false);
  return flags == 0 ? fake::init() : fake::kInvalidValue;
}
FAKE_EXPORT int cuGetErrorName(int code, const char** name) {
  *name = fake::error_name(code);
  return 0;
}
FAKE_EXPORT int cuGetErrorString(int, const char** text) {
  *text = "the fake driver's description";
  return 0;
}
FAKE_EXPORT int cuDeviceGetCount(int* count) {
  ENTER(true, false);
  *count = fake::kDevices;
  return 0;
}
FAKE_EXPORT int cuDeviceGet(int* device, int ordinal) {
  ENTER(true, false);
  return fake::device(device, ordinal);
}
FAKE_EXPORT int cuDeviceGetName(char* name, int length, int device) {
  ENTER(true, false);
  return fake::device_name(name, length, device);
}
FAKE_EXPORT int cuDeviceTotalMem_v2(std::size_t* bytes, int) {
  ENTER(true, false);
  *bytes = fake::kCapacity;
  return 0;
}
FAKE_EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER(true, false);
  if (attribute != 134) return fake::kInvalidValue;  // HOST_NUMA_ID
  *value = 3 + device;
  return 0;
}
FAKE_EXPORT int cuDeviceGetPCIBusId(char* id, int length, int device) {
  ENTER(true, false);
  return fake::pci_id(id, length, device);
}
FAKE_EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER(true, false);
  *context = &contexts[device];
  return 0;
}
FAKE_EXPORT int cuCtxGetCurrent(void** context) {
  ENTER(true, false);
  *context = fake::current < 0 ? nullptr : &contexts[fake::current];
  return 0;
}
FAKE_EXPORT int cuCtxSetCurrent(void* context) {
  ENTER(true, false);
  fake::current = context == nullptr ? -1 : static_cast<int>(static_cast<int*>(context) - contexts);
  return 0;
}
FAKE_EXPORT int cuMemGetInfo_v2(std::size_t* free_bytes, std::size_t* total) {
  ENTER(true, true);
  return fake::memory_info(free_bytes, total);
}
FAKE_EXPORT int cuMemAlloc_v2(Pointer* pointer, std::size_t bytes) {
  ENTER(true, true);
  std::uintptr_t address = 0;
  const int code = fake::alloc(&address, bytes);
  if (code == 0) *pointer = address;
  return code;
}
FAKE_EXPORT int cuMemFree_v2(Pointer pointer) {
  ENTER(true, true);
  return fake::free(pointer);
}
#ifndef FAKE_INCOMPLETE
FAKE_EXPORT int cuMemHostRegister_v2(void* host, std::size_t bytes, unsigned flags) {
  ENTER(true, true);
  return fake::register_host(host, bytes, flags);
}
#endif
FAKE_EXPORT int cuMemHostUnregister(void* host) {
  ENTER(true, true);
  return fake::unregister_host(host);
}
FAKE_EXPORT int cuStreamCreate(void** stream, unsigned flags) {
  ENTER(true, true);
  return fake::stream_create(__func__, stream, flags);
}
FAKE_EXPORT int cuStreamDestroy_v2(void* stream) {
  ENTER(true, true);
  return fake::stream_destroy(stream);
}
FAKE_EXPORT int cuStreamSynchronize(void* stream) {
  ENTER(true, true);
  return fake::stream_synchronize(stream);
}
FAKE_EXPORT int cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
  ENTER(true, true);
  return fake::stream_wait_event(stream, event, flags);
}
FAKE_EXPORT int cuEventCreate(void** event, unsigned flags) {
  ENTER(true, true);
  return fake::event_create(__func__, event, flags);
}
FAKE_EXPORT int cuEventDestroy_v2(void* event) {
  ENTER(true, true);
  return fake::event_destroy(event);
}
FAKE_EXPORT int cuEventRecord(void* event, void* stream) {
  ENTER(true, true);
  return fake::event_record(event, stream);
}
FAKE_EXPORT int cuEventQuery(void* event) {
  ENTER(true, true);
  return fake::event_check(event);
}
FAKE_EXPORT int cuEventSynchronize(void* event) {
  ENTER(true, true);
  return fake::event_check(event);
}
#ifndef FAKE_INCOMPLETE
FAKE_EXPORT int cuEventElapsedTime(float* ms, void* start, void* end) {
  ENTER(true, true);
  return fake::event_elapsed(ms, start, end);
}
#endif
FAKE_EXPORT int cuMemcpyHtoDAsync_v2(Pointer device, const void* host, std::size_t bytes, void* stream) {
  ENTER(true, true);
  return fake::copy(reinterpret_cast<void*>(static_cast<std::uintptr_t>(device)), host, device, bytes, stream);
}
FAKE_EXPORT int cuMemcpyDtoHAsync_v2(void* host, Pointer device, std::size_t bytes, void* stream) {
  ENTER(true, true);
  return fake::copy(host, reinterpret_cast<const void*>(static_cast<std::uintptr_t>(device)), device, bytes, stream);
}
