// The bf16 half is the master weight rounded half away from zero, so for every number it is a bf16 neighbour of
// the master; near the largest float it is infinity, and only the residual says that the master is finite. NaN
// patterns from 0x7fff8000 (and 0xffff8000) on wrap: merge() still returns them exactly, but their bf16 half reads
// as a zero. The update itself never stores such a pattern.

#include <cstddef>
#include <cstdint>

#include "optimizer/instruction_set.h"
#include "slidecore/optimizer.h"

namespace slidecore {
namespace {

constexpr std::size_t block = std::size_t{1} << 16;

}  // namespace

void split(ThreadPool& pool, const float* master, std::uint16_t* weight, std::int16_t* residual, std::size_t n) {
  const kernels::Table& table = kernel_table();
  pool.run(n, block, [&](std::size_t begin, std::size_t end) {
    table.split(master + begin, weight + begin, residual + begin, end - begin);
  });
}

void merge(ThreadPool& pool, const std::uint16_t* weight, const std::int16_t* residual, float* master, std::size_t n) {
  const kernels::Table& table = kernel_table();
  pool.run(n, block, [&](std::size_t begin, std::size_t end) {
    table.merge(weight + begin, residual + begin, master + begin, end - begin);
  });
}

}  // namespace slidecore
