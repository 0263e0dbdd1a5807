#pragma once
// Return codes that the backends share. CUDA's and HIP's drivers use the same numbers for these, so the host
// backend takes them too and callers of a table need to know one set only.

#include "slidecore/device.h"

namespace slidecore::device {

inline constexpr int kSuccess = 0;
inline constexpr int kInvalidValue = 1;
inline constexpr int kOutOfMemory = kDeviceOutOfMemory;
inline constexpr int kNoDevice = 100;
inline constexpr int kInvalidDevice = 101;
inline constexpr int kInvalidHandle = 400;
inline constexpr int kNotReady = 600;
inline constexpr int kUnknown = 999;

}  // namespace slidecore::device
