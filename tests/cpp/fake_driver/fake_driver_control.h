#pragma once
// What tests reach in a fake driver library by dlsym.

#include <cstddef>

struct FakeLive {
  std::size_t allocations, registrations, streams, events;
};

using FakeFail = void(const char* function, int code, int skip);  // the call after `skip` more returns `code`, once
using FakeCalls = long(const char* function);
using FakeFlags = unsigned(const char* function);  // of the last stream or event creation
using FakeLiveObjects = FakeLive();
using FakeCurrent = int();  // of the calling thread; -1: none
using FakeSetCurrent = void(int device);
