#include "slidecore/adamw_sink.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <string>
#include <utility>

#include "optimizer/adamw_block.h"
#include "optimizer/float_environment.h"
#include "optimizer/instruction_set.h"
#include "optimizer/moments8.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

struct Range {
  std::size_t begin;
  std::size_t end;
  kernels::Scalars scalars;
};

using Table = std::vector<Range>;

struct Chunk {
  AdamWPlanes planes;
  std::size_t n;
  GradientType type;
  std::deque<Table> prepared;  // guarded by the mutex
  Table active;                // the update lane's own between begin() and end()
  bool begun = false;          // the update lane's own
};

std::string label(std::uint32_t chunk) {
  return "AdamWSink: chunk " + std::to_string(chunk);
}

// All but step, which only enters through the scalars: equal scalars are an equal update.
bool same_update(const kernels::Scalars& a, const kernels::Scalars& b) {
  return a.gradient_factor == b.gradient_factor && a.decay == b.decay && a.lerp_factor == b.lerp_factor &&
         a.lerp_from_gradient == b.lerp_from_gradient && a.beta2 == b.beta2 && a.one_minus_beta2 == b.one_minus_beta2 &&
         a.bias_correction2_sqrt == b.bias_correction2_sqrt && a.eps == b.eps && a.minus_step_size == b.minus_step_size;
}

Table checked(std::uint32_t chunk, std::size_t n, std::size_t whole, const std::vector<AdamWSink::Segment>& segments) {
  Table table;
  std::size_t previous_end = 0;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const auto& [offset, length, hyper] = segments[i];
    const auto where = [&] {
      return label(chunk) + ", segment " + std::to_string(i) + " (offset " + std::to_string(offset) + ", length " +
             std::to_string(length) + ")";
    };
    if (offset > n || length > n - offset) {
      throw Error(Code::invalid_argument, where() + " reaches past the chunk's " + std::to_string(n) + " elements");
    }
    if (offset < previous_end) {
      throw Error(Code::invalid_argument, where() + " starts before the end of the one before it, " +
                                              std::to_string(previous_end) + ": give them ascending, without overlap");
    }
    if (offset % whole != 0) {
      throw Error(Code::invalid_argument,
                  where() + " does not start at a group of 8-bit moments, a multiple of " + std::to_string(whole));
    }
    previous_end = offset + length;
    kernels::Scalars scalars{};
    try {
      scalars = adamw_scalars(hyper);
    } catch (const Error& error) {
      throw Error(error.code(), where() + ": " + error.what());
    }
    if (length == 0) continue;
    if (!table.empty() && table.back().end == offset && same_update(table.back().scalars, scalars)) {
      table.back().end = previous_end;
    } else {
      table.push_back({offset, previous_end, scalars});
    }
  }
  return table;
}

}  // namespace

struct AdamWSink::Impl {
  // References stay valid: a deque does not move its elements when it grows at its end.
  Chunk& chunk(std::uint32_t index) {
    const std::lock_guard lock(mutex);
    if (index >= chunks.size()) {
      throw Error(Code::invalid_argument,
                  label(index) + " is unknown: " + std::to_string(chunks.size()) + " chunks were added");
    }
    return chunks[index];
  }

  std::shared_ptr<ThreadPool> pool;
  std::mutex mutex;
  std::deque<Chunk> chunks;
};

AdamWSink::AdamWSink(std::shared_ptr<ThreadPool> pool) : impl_(std::make_unique<Impl>()) {
  if (pool == nullptr) throw Error(Code::invalid_argument, "AdamWSink: the thread pool is null");
  impl_->pool = std::move(pool);
}

AdamWSink::~AdamWSink() = default;

std::uint32_t AdamWSink::add_chunk(const AdamWPlanes& planes, std::size_t n, GradientType type) {
  check_planes(planes, n);
  const std::lock_guard lock(impl_->mutex);
  impl_->chunks.push_back({.planes = planes, .n = n, .type = type, .prepared = {}, .active = {}});
  return static_cast<std::uint32_t>(impl_->chunks.size() - 1);
}

void AdamWSink::prepare(std::uint32_t index, const std::vector<Segment>& segments) {
  Chunk& chunk = impl_->chunk(index);
  Table table = checked(index, chunk.n, indivisible(chunk.planes), segments);
  const std::lock_guard lock(impl_->mutex);
  chunk.prepared.push_back(std::move(table));
}

void AdamWSink::discard(std::uint32_t index) {
  Chunk& chunk = impl_->chunk(index);
  const std::lock_guard lock(impl_->mutex);
  chunk.prepared.clear();
}

void AdamWSink::begin(std::uint32_t index) {
  Chunk& chunk = impl_->chunk(index);
  if (chunk.begun) throw Error(Code::state, label(index) + " began a submission before its last one ended");
  const std::lock_guard lock(impl_->mutex);
  if (chunk.prepared.empty()) {
    throw Error(Code::state, label(index) +
                                 " got a gradient that no step was prepared for: call prepare() once for "
                                 "each submission, before it");
  }
  chunk.active = std::move(chunk.prepared.front());
  chunk.prepared.pop_front();
  chunk.begun = true;
}

void AdamWSink::consume(std::uint32_t index, std::size_t offset_bytes, const void* piece, std::size_t bytes) {
  const Chunk& chunk = impl_->chunk(index);
  if (!chunk.begun) throw Error(Code::state, label(index) + " got a piece outside of a submission");
  const std::size_t size = gradient_bytes(chunk.type);
  const std::size_t first = offset_bytes / size;
  const std::size_t count = bytes / size;
  if (offset_bytes % size != 0 || bytes % size != 0 || first > chunk.n || count > chunk.n - first) {
    throw Error(Code::invalid_argument, label(index) + ": a piece of " + std::to_string(bytes) + " bytes at byte " +
                                            std::to_string(offset_bytes) + " does not lie in the gradient's " +
                                            std::to_string(chunk.n * size) + " bytes, or cuts an element");
  }
  const std::size_t whole = indivisible(chunk.planes);
  if (first % whole != 0 || ((first + count) % whole != 0 && first + count != chunk.n)) {
    throw Error(Code::invalid_argument, label(index) + ": a piece of the elements " + std::to_string(first) + " to " +
                                            std::to_string(first + count) + " cuts a group of 8-bit moments, of " +
                                            std::to_string(whole) + "; give pieces of a multiple of 4096 bytes");
  }
  check_gradient(piece, chunk.type, count);
  const kernels::Table& table = kernel_table();
  impl_->pool->run(count, adamw_block_size, [&](std::size_t block_begin, std::size_t block_end) {
    const DefaultFloatEnvironment environment;
    const std::size_t from = first + block_begin;
    const std::size_t to = first + block_end;
    auto range = std::upper_bound(chunk.active.begin(), chunk.active.end(), from,
                                  [](std::size_t element, const Range& r) { return element < r.end; });
    for (; range != chunk.active.end() && range->begin < to; ++range) {
      adamw_block(table, range->scalars, chunk.planes, piece, first, chunk.type, std::max(range->begin, from),
                  std::min(range->end, to));
    }
  });
}

void AdamWSink::end(std::uint32_t index) {
  Chunk& chunk = impl_->chunk(index);
  if (!chunk.begun) throw Error(Code::state, label(index) + " ended a submission that had not begun");
  chunk.active = Table{};
  chunk.begun = false;
}

}  // namespace slidecore
