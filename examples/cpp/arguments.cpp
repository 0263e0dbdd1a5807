#include "arguments.h"

#include <charconv>
#include <cmath>
#include <string_view>

const char* const kUsage =
    R"(usage: overlap [--backend host|cuda|hip] [--chunks N] [--chunk-mib N] [--window N] [--steps N]
               [--compute-ms X] [--json]

Streams chunks through a window of device memory, forward and backward, with gradients coming down and updates
applied on the host, and prints how much of that work overlapped. First each lane is measured alone.

  --backend      where the window lies (host: no device is needed)                         [host]
  --chunks       buffers that take turns in the window, 1 to 4096                          [8]
  --chunk-mib    size of each in MiB, 1 to 4096                                            [16]
  --window       slots of the window, 1 to 64                                              [2]
  --steps        measured steps, 1 to 10000; one more runs first as a warm-up              [5]
  --compute-ms   simulated computation of one visit  [as long as the upload of one chunk]
  --json         print one JSON object instead of text

Exit status: 0 done and verified, 1 a result was wrong, 2 bad arguments, 3 this machine cannot run it.
)";

namespace {

std::size_t parse_count(std::string_view name, std::string_view text, std::size_t most) {
  std::size_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc{} || stop != end || value < 1 || value > most) {
    throw BadArgument(std::string(name) + " takes a whole number from 1 to " + std::to_string(most) + ", not '" +
                      std::string(text) + "'");
  }
  return value;
}

double parse_ms(std::string_view name, const std::string& text) {
  std::size_t used = 0;
  double value = 0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size() || !std::isfinite(value) || value <= 0 || value > 60e3) {
    throw BadArgument(std::string(name) + " takes milliseconds above 0 and up to 60000, not '" + text + "'");
  }
  return value;
}

std::string parse_backend(std::string_view name, const std::string& text) {
  if (text != "host" && text != "cuda" && text != "hip") {
    throw BadArgument(std::string(name) + " takes host, cuda or hip, not '" + text + "'");
  }
  return text;
}

}  // namespace

Arguments parse_arguments(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i];
    if (name == "--json") {
      arguments.json = true;
      continue;
    }
    if (name == "--help" || name == "-h") {
      arguments.help = true;
      continue;
    }
    std::string value;
    if (const std::size_t equals = name.find('='); equals != std::string::npos) {
      value = name.substr(equals + 1);
      name.resize(equals);
    } else if (i + 1 < argc) {
      value = argv[++i];
    } else {
      throw BadArgument("'" + name + "' is unknown or lacks its value");
    }
    if (name == "--backend") {
      arguments.backend = parse_backend(name, value);
    } else if (name == "--chunks") {
      arguments.chunks = parse_count(name, value, 4096);
    } else if (name == "--chunk-mib") {
      arguments.chunk_mib = parse_count(name, value, 4096);
    } else if (name == "--window") {
      arguments.window = parse_count(name, value, 64);
    } else if (name == "--steps") {
      arguments.steps = parse_count(name, value, 10000);
    } else if (name == "--compute-ms") {
      arguments.compute_ms = parse_ms(name, value);
    } else {
      throw BadArgument("unknown argument '" + name + "'");
    }
  }
  return arguments;
}
