#pragma once
// Words for failures.

#include <cstdint>
#include <string>

namespace slidecore::io {

std::string errno_text(long code);  // of a positive or negative errno

// "17179869184 bytes (16.0 GiB)"
std::string size_text(std::uint64_t bytes);

}  // namespace slidecore::io
