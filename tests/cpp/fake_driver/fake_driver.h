#pragma once
// What a driver does, done at once on the calling thread and strictly checked, for the fake libraries to export
// under CUDA's and HIP's names. Each library has its own copy of this state.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <string>

#include "fake_driver_control.h"

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

inline constexpr int kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kInvalidDevice = 101,
                     kInvalidContext = 201, kInvalidHandle = 400, kAlreadyRegistered = 712, kNotRegistered = 713;
inline constexpr int kDevices = 2;
inline constexpr std::size_t kCapacity = std::size_t{64} << 20;

struct Event {
  bool timing;
  bool recorded;
  double ms;
};

struct Failure {
  int code;
  int skip;
};

struct State {
  std::mutex mutex;
  bool initialized = false;
  std::map<std::string, long> calls;
  std::map<std::string, unsigned> flags;
  std::map<std::string, Failure> failures;
  std::map<std::uintptr_t, std::size_t> allocations;
  std::map<std::uintptr_t, std::size_t> registrations;
  std::set<void*> streams;
  std::map<void*, Event*> events;
  std::size_t used = 0;
  double clock_ms = 0;
};

// Never destroyed: what a test makes the driver fail to free stays reachable, so it is no leak of the code under test.
inline State& state() {
  static State& the_state = *new State;
  return the_state;
}

inline thread_local int current = -1;  // HIP starts at 0: see fake_hip.cpp

// What every function checks: an injected failure, then (as asked) cuInit and a current device. Returns 0 to go on.
inline int enter(const char* name, bool needs_init, bool needs_current) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  ++s.calls[name];
  if (const auto failure = s.failures.find(name); failure != s.failures.end()) {
    if (failure->second.skip-- == 0) {
      const int code = failure->second.code;
      s.failures.erase(failure);
      return code;
    }
  }
  if (needs_init && !s.initialized) return kNotInitialized;
  if (needs_current && current < 0) return kInvalidContext;
  return 0;
}

inline int init() {
  std::lock_guard lock(state().mutex);
  state().initialized = true;
  return 0;
}

inline int device(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= kDevices) return kInvalidDevice;
  *device = ordinal;
  return 0;
}

inline int device_name(char* name, int length, int device) {
  std::snprintf(name, static_cast<std::size_t>(length), "fake device %d", device);
  return 0;
}

inline int pci_id(char* id, int length, int device) {
  std::snprintf(id, static_cast<std::size_t>(length), "FFFF:0%d:00.0", device);
  return 0;
}

inline int memory_info(std::size_t* free_bytes, std::size_t* total) {
  std::lock_guard lock(state().mutex);
  *free_bytes = kCapacity - state().used;
  *total = kCapacity;
  return 0;
}

inline int alloc(std::uintptr_t* pointer, std::size_t bytes) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  if (bytes == 0) return kInvalidValue;
  if (bytes > kCapacity - s.used) return kOutOfMemory;
  *pointer = reinterpret_cast<std::uintptr_t>(::operator new(bytes));
  s.allocations[*pointer] = bytes;
  s.used += bytes;
  return 0;
}

inline int free(std::uintptr_t pointer) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  const auto found = s.allocations.find(pointer);
  if (found == s.allocations.end()) return kInvalidValue;
  s.used -= found->second;
  s.allocations.erase(found);
  ::operator delete(reinterpret_cast<void*>(pointer));
  return 0;
}

inline bool inside(const std::map<std::uintptr_t, std::size_t>& ranges, std::uintptr_t begin, std::size_t bytes) {
  auto found = ranges.upper_bound(begin);
  if (found == ranges.begin()) return false;
  --found;
  return begin - found->first <= found->second && bytes <= found->second - (begin - found->first);
}

inline int register_host(void* host, std::size_t bytes, unsigned flags) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  const auto begin = reinterpret_cast<std::uintptr_t>(host);
  if (bytes == 0 || flags != 1) return kInvalidValue;  // PORTABLE
  for (const auto& [other, size] : s.registrations) {
    if (begin < other + size && other < begin + bytes) return kAlreadyRegistered;
  }
  s.registrations[begin] = bytes;
  return 0;
}

inline int unregister_host(void* host) {
  std::lock_guard lock(state().mutex);
  return state().registrations.erase(reinterpret_cast<std::uintptr_t>(host)) == 1 ? 0 : kNotRegistered;
}

inline int stream_create(const char* name, void** stream, unsigned flags) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  s.flags[name] = flags;
  *stream = ::operator new(1);
  s.streams.insert(*stream);
  return 0;
}

inline int stream_destroy(void* stream) {
  std::lock_guard lock(state().mutex);
  if (state().streams.erase(stream) != 1) return kInvalidHandle;
  ::operator delete(stream);
  return 0;
}

// With the lock held.
inline bool is_stream(void* stream) {
  return stream == nullptr || state().streams.count(stream) == 1;
}

inline int stream_synchronize(void* stream) {
  std::lock_guard lock(state().mutex);
  return is_stream(stream) ? 0 : kInvalidHandle;
}

inline int stream_wait_event(void* stream, void* event, unsigned flags) {
  std::lock_guard lock(state().mutex);
  if (flags != 0) return kInvalidValue;
  return is_stream(stream) && state().events.count(event) == 1 ? 0 : kInvalidHandle;
}

inline int event_create(const char* name, void** event, unsigned flags) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  s.flags[name] = flags;
  auto* created = new Event{(flags & 2) == 0, false, 0};
  s.events[created] = created;
  *event = created;
  return 0;
}

inline int event_destroy(void* event) {
  std::lock_guard lock(state().mutex);
  const auto found = state().events.find(event);
  if (found == state().events.end()) return kInvalidHandle;
  delete found->second;
  state().events.erase(found);
  return 0;
}

inline int event_record(void* event, void* stream) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  const auto found = s.events.find(event);
  if (found == s.events.end() || !is_stream(stream)) return kInvalidHandle;
  found->second->recorded = true;
  found->second->ms = s.clock_ms += 1.5;
  return 0;
}

inline int event_check(void* event) {
  std::lock_guard lock(state().mutex);
  return state().events.count(event) == 1 ? 0 : kInvalidHandle;
}

inline int event_elapsed(float* ms, void* start, void* end) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  const auto first = s.events.find(start), second = s.events.find(end);
  if (first == s.events.end() || second == s.events.end()) return kInvalidHandle;
  for (const Event* event : {first->second, second->second}) {
    if (!event->timing || !event->recorded) return kInvalidHandle;
  }
  *ms = static_cast<float>(second->second->ms - first->second->ms);
  return 0;
}

inline int copy(void* to, const void* from, std::uintptr_t device, std::size_t bytes, void* stream) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  if (!is_stream(stream)) return kInvalidHandle;
  if (!inside(s.allocations, device, bytes)) return kInvalidValue;
  std::memcpy(to, from, bytes);
  return 0;
}

inline const char* error_name(int code) {
  switch (code) {
    case kInvalidValue:
      return "FAKE_ERROR_INVALID_VALUE";
    case kOutOfMemory:
      return "FAKE_ERROR_OUT_OF_MEMORY";
    case kInvalidDevice:
      return "FAKE_ERROR_INVALID_DEVICE";
    case kInvalidHandle:
      return "FAKE_ERROR_INVALID_HANDLE";
    case kAlreadyRegistered:
      return "FAKE_ERROR_HOST_MEMORY_ALREADY_REGISTERED";
    default:
      return "FAKE_ERROR_OTHER";
  }
}

}  // namespace fake

FAKE_EXPORT void fake_fail(const char* function, int code, int skip) {
  std::lock_guard lock(fake::state().mutex);
  fake::state().failures[function] = {code, skip};
}
FAKE_EXPORT long fake_calls(const char* function) {
  std::lock_guard lock(fake::state().mutex);
  return fake::state().calls[function];
}
FAKE_EXPORT unsigned fake_flags(const char* function) {
  std::lock_guard lock(fake::state().mutex);
  return fake::state().flags[function];
}
FAKE_EXPORT FakeLive fake_live() {
  fake::State& s = fake::state();
  std::lock_guard lock(s.mutex);
  return {s.allocations.size(), s.registrations.size(), s.streams.size(), s.events.size()};
}
FAKE_EXPORT int fake_current() {
  return fake::current;
}
FAKE_EXPORT void fake_set_current(int device) {
  fake::current = device;
}
