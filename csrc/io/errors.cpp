#include "io/errors.h"

#include <cstdio>
#include <cstdlib>
#include <system_error>

namespace slidecore::io {

std::string errno_text(long code) {
  return std::generic_category().message(static_cast<int>(std::labs(code)));
}

std::string size_text(std::uint64_t bytes) {
  static constexpr const char* kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  const std::string exact = std::to_string(bytes) + " bytes";
  auto scaled = static_cast<double>(bytes);
  int unit = 0;
  for (; scaled >= 1024 && unit < 6; ++unit) scaled /= 1024;
  if (unit == 0) return exact;
  char text[32];
  std::snprintf(text, sizeof text, "%.1f %s", scaled, kUnits[unit]);
  return exact + " (" + text + ")";
}

}  // namespace slidecore::io
