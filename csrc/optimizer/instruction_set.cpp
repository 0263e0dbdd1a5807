#include "optimizer/instruction_set.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "slidecore/optimizer.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

struct Candidate {
  const kernels::Table* table;
  bool (*runs_here)();
};

// Worst first. __builtin_cpu_supports also asks the operating system (XCR0) whether it saves the registers.
#ifdef SLIDECORE_X86_KERNELS
constexpr std::array<Candidate, 3> candidates = {{
    {&kernels::generic::table, [] { return true; }},
    {&kernels::avx2::table, [] { return __builtin_cpu_supports("avx2") != 0; }},
    {&kernels::avx512::table,
     [] {
       return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
              __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0;
     }},
}};
#else
constexpr std::array<Candidate, 1> candidates = {{{&kernels::generic::table, [] { return true; }}}};
#endif

std::string known_names() {
  std::string names;
  for (const Candidate& candidate : candidates) names += std::string(names.empty() ? "" : ", ") + candidate.table->name;
  return names;
}

const kernels::Table& find(const std::string& name, const std::string& source) {
  for (const Candidate& candidate : candidates) {
    if (name != candidate.table->name) continue;
    if (!candidate.runs_here()) {
      throw Error(Code::unsupported,
                  source + ": this CPU or its operating system lacks instruction set '" + name + "'");
    }
    return *candidate.table;
  }
  throw Error(Code::invalid_argument,
              source + ": unknown instruction set '" + name + "'; this build has: " + known_names());
}

const kernels::Table& choose() {
  if (const char* name = std::getenv("SLIDECORE_ISA"); name != nullptr && *name != '\0') {
    return find(name, "SLIDECORE_ISA");
  }
  const kernels::Table* best = nullptr;
  for (const Candidate& candidate : candidates) {
    if (candidate.runs_here()) best = candidate.table;
  }
  return *best;
}

std::atomic<const kernels::Table*> forced{nullptr};

}  // namespace

const kernels::Table& kernel_table() {
  if (const kernels::Table* table = forced.load(std::memory_order_acquire)) return *table;
  static const kernels::Table& chosen = choose();
  return chosen;
}

const char* instruction_set() {
  return kernel_table().name;
}

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates) {
    if (candidate.runs_here()) names.emplace_back(candidate.table->name);
  }
  return names;
}

void force_instruction_set(const std::string& name) {
  forced.store(name.empty() ? nullptr : &find(name, "force_instruction_set"), std::memory_order_release);
}

}  // namespace slidecore
