#pragma once
// The command line of the example.

#include <cstddef>
#include <stdexcept>
#include <string>

struct Arguments {
  std::string backend = "host";
  std::size_t chunks = 8;
  std::size_t chunk_mib = 16;
  std::size_t window = 2;
  std::size_t steps = 5;
  double compute_ms = 0;  // of one visit; 0: as long as the upload of one chunk takes alone
  bool json = false;
  bool help = false;
};

struct BadArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

Arguments parse_arguments(int argc, char** argv);  // throws BadArgument
extern const char* const kUsage;
