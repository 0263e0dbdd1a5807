#pragma once
// What tests reach in a fake cuFile library by dlsym.

#include <cstddef>

struct FakeCuFileState {
  long opens, handles;  // that were not closed or removed again
  long reads, writes;   // requests
};

// The `function` call after `skip` more gives `result`, once: a CUfileOpError, or of a read or write what it returns
// (-1: with `error` in errno). A positive result is the most that is moved.
using FakeCuFileFail = void(const char* function, long result, int error, int skip);
using FakeCuFileProperties = void(unsigned nvfs_major, unsigned status, unsigned features);
using FakeCuFileLive = FakeCuFileState();
