#pragma once
// AdamW on the CPU over planes, the split of fp32 weights into planes, and the threads they run on.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace slidecore {

// Threads of the update lane. run() calls body(begin, end) for fixed blocks of [0, n) and returns when all are
// done; the calling thread takes part. An exception of a body is rethrown by run(). One run() at a time: a second
// caller waits its turn, and a run() inside a body, or in a forked child (which has no workers), is done alone.
class ThreadPool {
 public:
  // threads = 0: SLIDECORE_THREADS if set, else the CPUs this process may use (affinity and cgroup quota), less one
  // that is left to the framework's launching thread, at least 1. The count includes the caller of run().
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  int threads() const;
  void run(std::size_t n, std::size_t block, const std::function<void(std::size_t, std::size_t)>& body);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// CPUs usable by this process: affinity mask, limited by the cgroup's CPU quota.
int usable_cpus();

// fp32 <-> planes, exact for all 2^32 patterns:
//   weight = (bits + 0x8000) >> 16; residual = int16(bits); bits = (weight << 16) + sign_extend(residual)
// For NaN patterns from 0x7fff8000 (0xffff8000) on, the weight plane alone reads as a zero, not as a NaN; adamw()
// never stores one of these. Finite values from 0x7f7f8000 on have infinity as their weight.
void split(ThreadPool& pool, const float* master, std::uint16_t* weight, std::int16_t* residual, std::size_t n);
void merge(ThreadPool& pool, const std::uint16_t* weight, const std::int16_t* residual, float* master, std::size_t n);

enum class GradientType { bfloat16, float32 };

// Parameters that share a scale of 8-bit moments.
inline constexpr std::size_t moments_group = 128;

// Where n consecutive parameters of a chunk lie. Either weight+residual (bf16 compute) or weight32 (fp32 compute), and
// either exp_avg+exp_avg_sq (float32 moments) or the four planes of 8-bit moments. Those hold a code for each parameter
// and a scale for each moments_group of them, counted from the first: ceil(n / moments_group) scales. Elements past n
// have no part in the last one. Zeros are zero moments. docs/numerics.md has the formulas.
struct AdamWPlanes {
  std::uint16_t* weight = nullptr;
  std::int16_t* residual = nullptr;
  float* weight32 = nullptr;
  float* exp_avg = nullptr;
  float* exp_avg_sq = nullptr;
  std::int8_t* exp_avg8 = nullptr;  // -127 to 127
  std::uint8_t* exp_avg_sq8 = nullptr;
  float* exp_avg_scale = nullptr;
  float* exp_avg_sq_scale = nullptr;
};

struct AdamWHyper {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 1e-2;
  std::int64_t step = 1;  // of this parameter, counted from 1, including this update
  bool maximize = false;
  float gradient_scale = 1.f;  // multiplies the gradient first (clip factor)
};

// One decoupled-weight-decay step (Loshchilov & Hutter, arXiv 1711.05101) in the order of operations of
// torch.optim.AdamW's single-tensor path, in fp32 without contraction: bit-identical for every instruction set,
// thread count and division into calls, whatever the caller's rounding and denormal modes; a NaN is always stored as
// 0x7fc00000. `planes` and `gradient` point at the first of the n parameters. Torch's own bits depend on its build:
// without its FMA kernels (ATEN_CPU_CAPABILITY=default) its moments equal these, and its weights differ only where
// its vector library's sqrt is not the correctly rounded one. With 8-bit moments the same arithmetic follows the
// dequantised moments, the weights are updated from the new ones before these are quantised, and a division into calls
// must not cut a group.
void adamw(ThreadPool& pool, const AdamWHyper& hyper, const AdamWPlanes& planes, const void* gradient,
           GradientType type, std::size_t n);

// "generic" | "avx2" | "avx512": the best this CPU has, unless SLIDECORE_ISA forces one. Forcing one that is
// unknown or that the CPU lacks throws Error(invalid_argument / unsupported). Read at first use.
const char* instruction_set();
std::vector<std::string> available_instruction_sets();
void force_instruction_set(const std::string& name);  // for tests; "" returns to automatic choice

// memcpy of `bytes` by the pool's threads: the peer that bench/adamw.py measures the update against.
void parallel_copy(ThreadPool& pool, void* to, const void* from, std::size_t bytes);

}  // namespace slidecore
