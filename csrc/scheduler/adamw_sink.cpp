#include "slidecore/adamw_sink.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "optimizer/adamw_block.h"
#include "optimizer/float_environment.h"
#include "optimizer/instruction_set.h"
#include "optimizer/moments8.h"
#include "scheduler/disk_planes.h"
#include "scheduler/staging.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

struct Range {
  std::size_t begin;
  std::size_t end;
  kernels::Scalars scalars;
};

// The part of a segment in one block. Each part's squares have a place of their own, whoever computes them.
struct Part {
  std::size_t begin;
  std::size_t end;
  std::size_t segment;
  bool first;
};

// What becomes of one submission: an update by `ranges`, or the addition of `parts` to `sum`.
struct Job {
  GradientType type = GradientType::float32;
  std::vector<Range> ranges;
  float* sum = nullptr;
  std::vector<Part> parts;
  std::vector<double> squares;  // of each part
  std::size_t segments = 0;
  std::size_t consumed = 0;  // bytes of the gradient
};

struct Chunk {
  AdamWPlanes planes;
  AdamWRegions regions;
  std::size_t n;
  GradientType type;
  std::deque<Job> prepared;                    // guarded by the mutex
  std::optional<std::vector<double>> squares;  // of the last sum's segments; guarded by the mutex
  Job active;                                  // the update lane's own between begin() and end()
  bool begun = false;                          // written by the update lane alone, with the mutex
};

std::string label(std::uint32_t chunk) {
  return "AdamWSink: chunk " + std::to_string(chunk);
}

// Elements that an update cannot separate, wherever the planes lie.
std::size_t group_of(const Chunk& chunk) {
  return chunk.regions.exp_avg_scale != nullptr ? moments_group : indivisible(chunk.planes);
}

// All but step, which only enters through the scalars: equal scalars are an equal update.
bool same_update(const kernels::Scalars& a, const kernels::Scalars& b) {
  return a.gradient_factor == b.gradient_factor && a.decay == b.decay && a.lerp_factor == b.lerp_factor &&
         a.lerp_from_gradient == b.lerp_from_gradient && a.beta2 == b.beta2 && a.one_minus_beta2 == b.one_minus_beta2 &&
         a.bias_correction2_sqrt == b.bias_correction2_sqrt && a.eps == b.eps && a.minus_step_size == b.minus_step_size;
}

// Calls each(segment, where()) for segments that ascend, do not overlap and lie in the chunk's n elements.
template <class Segment, class Each>
void for_checked(std::uint32_t chunk, std::size_t n, const std::vector<Segment>& segments, const Each& each) {
  std::size_t previous_end = 0;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const std::size_t offset = segments[i].offset, length = segments[i].length;
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
    previous_end = offset + length;
    each(segments[i], where);
  }
}

// `whole`: elements that an update cannot separate.
std::vector<Range> ranges_of(std::uint32_t chunk, std::size_t n, std::size_t whole,
                             const std::vector<AdamWSink::Segment>& segments) {
  std::vector<Range> ranges;
  for_checked(chunk, n, segments, [&](const AdamWSink::Segment& segment, const auto& where) {
    if (segment.offset % whole != 0) {
      throw Error(Code::invalid_argument,
                  where() + " does not start at a group of 8-bit moments, a multiple of " + std::to_string(whole));
    }
    kernels::Scalars scalars{};
    try {
      scalars = adamw_scalars(segment.hyper);
    } catch (const Error& error) {
      throw Error(error.code(), where() + ": " + error.what());
    }
    if (segment.length == 0) return;
    const std::size_t end = segment.offset + segment.length;
    if (!ranges.empty() && ranges.back().end == segment.offset && same_update(ranges.back().scalars, scalars)) {
      ranges.back().end = end;
    } else {
      ranges.push_back({segment.offset, end, scalars});
    }
  });
  return ranges;
}

// Blocks count from the chunk's start, so that pieces of whole blocks never cut a part.
std::vector<Part> parts_of(std::uint32_t chunk, std::size_t n, const std::vector<AdamWSink::SumSegment>& segments) {
  std::vector<Part> parts;
  std::size_t index = 0;
  for_checked(chunk, n, segments, [&](const AdamWSink::SumSegment& segment, const auto&) {
    const std::size_t end = segment.offset + segment.length;
    for (std::size_t begin = segment.offset; begin < end;) {
      const std::size_t block_end = (begin / adamw_block_size + 1) * adamw_block_size;
      parts.push_back({begin, std::min(end, block_end), index, segment.first});
      begin = parts.back().end;
    }
    ++index;
  });
  return parts;
}

// The first of the items (ascending, apart) that reaches past `element`.
template <class Item>
std::size_t first_past(const std::vector<Item>& items, std::size_t element) {
  const auto found = std::upper_bound(items.begin(), items.end(), element,
                                      [](std::size_t e, const Item& item) { return e < item.end; });
  return static_cast<std::size_t>(found - items.begin());
}

// A block of the update: elements [from, to), of a piece whose first element is `first`.
void update_block(const Job& job, const AdamWPlanes& planes, const void* piece, std::size_t first, std::size_t from,
                  std::size_t to) {
  for (std::size_t i = first_past(job.ranges, from); i < job.ranges.size() && job.ranges[i].begin < to; ++i) {
    const Range& range = job.ranges[i];
    adamw_block(kernel_table(), range.scalars, planes, piece, first, job.type, std::max(range.begin, from),
                std::min(range.end, to));
  }
}

void sum_block(Job& job, const void* piece, std::size_t first, std::size_t from, std::size_t to) {
  const bool bfloat16 = job.type == GradientType::bfloat16;
  const auto kernel = bfloat16 ? kernel_table().accumulate_bfloat16 : kernel_table().accumulate_float32;
  for (std::size_t i = first_past(job.parts, from); i < job.parts.size() && job.parts[i].begin < to; ++i) {
    const Part& part = job.parts[i];
    const std::size_t begin = std::max(part.begin, from), end = std::min(part.end, to);
    const void* values = static_cast<const char*>(piece) + (begin - first) * gradient_bytes(job.type);
    job.squares[i] += kernel(job.sum + begin, values, end - begin, part.first);
  }
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

  std::size_t first_element(const Chunk& chunk, std::size_t offset_bytes) const;
  bool next_is_a_sum(const Chunk& chunk) const;

  std::shared_ptr<ThreadPool> pool;
  std::unique_ptr<Staging> staging;  // null: every plane is in memory
  mutable std::mutex mutex;
  std::deque<Chunk> chunks;
};

AdamWSink::AdamWSink(std::shared_ptr<ThreadPool> pool) : impl_(std::make_unique<Impl>()) {
  if (pool == nullptr) throw Error(Code::invalid_argument, "AdamWSink: the thread pool is null");
  impl_->pool = std::move(pool);
}

AdamWSink::~AdamWSink() = default;

std::uint32_t AdamWSink::add_chunk(const AdamWPlanes& planes, std::size_t n, GradientType type) {
  check_planes(planes, n);
  const std::uint32_t index = add_chunk(n, type);
  impl_->chunk(index).planes = planes;
  return index;
}

std::uint32_t AdamWSink::add_chunk(std::size_t n, GradientType type) {
  const std::lock_guard lock(impl_->mutex);
  impl_->chunks.push_back(
      {.planes = {}, .regions = {}, .n = n, .type = type, .prepared = {}, .squares = {}, .active = {}});
  return static_cast<std::uint32_t>(impl_->chunks.size() - 1);
}

void AdamWSink::use_disk(std::shared_ptr<Transfers> transfers, std::shared_ptr<Device> device, std::size_t stages,
                         std::size_t stage_elements) {
  if (transfers == nullptr || device == nullptr) {
    throw Error(Code::invalid_argument, "AdamWSink: the disk tier needs transfers and a device");
  }
  if (impl_->staging != nullptr) throw Error(Code::state, "AdamWSink: use_disk() was called before");
  impl_->staging =
      std::make_unique<Staging>(std::move(transfers), std::move(device), stages, most_staged_bytes(stage_elements));
}

std::size_t AdamWSink::staging_bytes() const {
  return impl_->staging == nullptr ? 0 : impl_->staging->bytes();
}

void AdamWSink::place(std::uint32_t index, const AdamWPlanes& planes, const AdamWRegions& regions) {
  Chunk& chunk = impl_->chunk(index);
  check_places(label(index), planes, regions, chunk.n);
  if (any_on_disk(regions) && impl_->staging == nullptr) {
    throw Error(Code::state, label(index) + ": planes can lie on disk after use_disk()");
  }
  const std::lock_guard lock(impl_->mutex);
  chunk.planes = planes;
  chunk.regions = regions;
}

void AdamWSink::prepare(std::uint32_t index, const std::vector<Segment>& segments) {
  prepare(index, segments, impl_->chunk(index).type);
}

void AdamWSink::prepare(std::uint32_t index, const std::vector<Segment>& segments, GradientType type) {
  Chunk& chunk = impl_->chunk(index);
  Job job;
  job.type = type;
  job.ranges = ranges_of(index, chunk.n, group_of(chunk), segments);
  const std::lock_guard lock(impl_->mutex);
  chunk.prepared.push_back(std::move(job));
}

void AdamWSink::prepare_sum(std::uint32_t index, const std::vector<SumSegment>& segments, float* sum,
                            GradientType type) {
  Chunk& chunk = impl_->chunk(index);
  if (sum == nullptr) throw Error(Code::invalid_argument, label(index) + ": the sum of gradients is null");
  Job job;
  job.type = type;
  job.sum = sum;
  job.parts = parts_of(index, chunk.n, segments);
  job.squares.resize(job.parts.size());
  job.segments = segments.size();
  const std::lock_guard lock(impl_->mutex);
  chunk.prepared.push_back(std::move(job));
}

std::vector<double> AdamWSink::squares(std::uint32_t index) {
  Chunk& chunk = impl_->chunk(index);
  const std::lock_guard lock(impl_->mutex);
  if (!chunk.squares) throw Error(Code::state, label(index) + " has added no gradient to a sum yet");
  return *chunk.squares;
}

void AdamWSink::discard(std::uint32_t index) {
  Chunk& chunk = impl_->chunk(index);
  const std::lock_guard lock(impl_->mutex);
  chunk.prepared.clear();
}

void AdamWSink::withdraw(std::uint32_t index) {
  Chunk& chunk = impl_->chunk(index);
  const std::lock_guard lock(impl_->mutex);
  if (!chunk.prepared.empty()) chunk.prepared.pop_back();
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
  Chunk& chunk = impl_->chunk(index);
  if (!chunk.begun) throw Error(Code::state, label(index) + " got a piece outside of a submission");
  Job& job = chunk.active;
  const std::size_t size = gradient_bytes(job.type);
  const std::size_t first = offset_bytes / size;
  const std::size_t count = bytes / size;
  if (offset_bytes % size != 0 || bytes % size != 0 || first > chunk.n || count > chunk.n - first) {
    throw Error(Code::invalid_argument, label(index) + ": a piece of " + std::to_string(bytes) + " bytes at byte " +
                                            std::to_string(offset_bytes) + " does not lie in the gradient's " +
                                            std::to_string(chunk.n * size) + " bytes, or cuts an element");
  }
  const bool from_disk = job.sum == nullptr && any_on_disk(chunk.regions);
  const AdamWPlanes planes =
      from_disk ? with_staged(chunk.planes, chunk.regions, impl_->staging->parts(index, first), first) : chunk.planes;
  if (job.sum == nullptr) check_planes(planes, count);
  const std::size_t whole = job.sum == nullptr ? group_of(chunk) : 1;
  if (first % whole != 0 || ((first + count) % whole != 0 && first + count != chunk.n)) {
    throw Error(Code::invalid_argument, label(index) + ": a piece of the elements " + std::to_string(first) + " to " +
                                            std::to_string(first + count) + " cuts a group of 8-bit moments, of " +
                                            std::to_string(whole) + "; give pieces of a multiple of 4096 bytes");
  }
  if (offset_bytes != job.consumed) {
    throw Error(Code::invalid_argument, label(index) + ": a piece at byte " + std::to_string(offset_bytes) +
                                            " of the gradient, of which " + std::to_string(job.consumed) +
                                            " bytes have come: pieces go in their order");
  }
  check_gradient(piece, job.type, count);
  // Blocks as parts count them, so that no two threads share one.
  const std::size_t skew = job.sum == nullptr ? 0 : first % adamw_block_size;
  impl_->pool->run(count + skew, adamw_block_size, [&](std::size_t block_begin, std::size_t block_end) {
    const DefaultFloatEnvironment environment;
    const std::size_t from = std::max(first, first - skew + block_begin);
    const std::size_t to = first - skew + block_end;
    if (job.sum == nullptr) {
      update_block(job, planes, piece, first, from, to);
    } else {
      sum_block(job, piece, first, from, to);
    }
  });
  job.consumed += bytes;
  if (from_disk) impl_->staging->finish(index, first);
}

void AdamWSink::end(std::uint32_t index) {
  Chunk& chunk = impl_->chunk(index);
  if (!chunk.begun) throw Error(Code::state, label(index) + " ended a submission that had not begun");
  const std::size_t whole = chunk.n * gradient_bytes(chunk.active.type);
  if (chunk.active.consumed != whole) {
    throw Error(Code::invalid_argument, label(index) + " got " + std::to_string(chunk.active.consumed) +
                                            " bytes of a gradient of " + std::to_string(whole) +
                                            ": a submission is the whole gradient, of the type that was prepared");
  }
  std::vector<double> squares(chunk.active.segments);
  for (std::size_t i = 0; i < chunk.active.parts.size(); ++i) {
    squares[chunk.active.parts[i].segment] += chunk.active.squares[i];
  }
  const std::lock_guard lock(impl_->mutex);
  if (chunk.active.sum != nullptr) chunk.squares = std::move(squares);
  chunk.active = Job{};
  chunk.begun = false;
}

bool AdamWSink::needs_stage(std::uint32_t index) {
  const Chunk& chunk = impl_->chunk(index);
  const std::lock_guard lock(impl_->mutex);
  return any_on_disk(chunk.regions);
}

// The scheduler asks once the chunk's submissions before this one have ended: either it has begun, or it is the next.
std::size_t AdamWSink::Impl::first_element(const Chunk& chunk, std::size_t offset_bytes) const {
  const std::lock_guard lock(mutex);
  if (chunk.begun) return offset_bytes / gradient_bytes(chunk.active.type);
  return offset_bytes / gradient_bytes(chunk.prepared.empty() ? chunk.type : chunk.prepared.front().type);
}

bool AdamWSink::Impl::next_is_a_sum(const Chunk& chunk) const {
  const std::lock_guard lock(mutex);
  if (chunk.begun) return chunk.active.sum != nullptr;
  return !chunk.prepared.empty() && chunk.prepared.front().sum != nullptr;
}

bool AdamWSink::stage(std::uint32_t index, std::size_t offset_bytes, std::size_t bytes) {
  const Chunk& chunk = impl_->chunk(index);
  if (impl_->next_is_a_sum(chunk)) {
    throw Error(Code::state, label(index) + ": a sum was prepared for what is submitted as an update");
  }
  const std::size_t first = impl_->first_element(chunk, offset_bytes);
  const std::size_t end = impl_->first_element(chunk, offset_bytes + bytes);
  if (end > chunk.n) return true;  // consume() refuses it
  return impl_->staging->begin(index, first, parts_on_disk(chunk.regions, first, end - first));
}

bool AdamWSink::staged(std::uint32_t index, std::size_t offset_bytes) {
  return impl_->staging->ready(index, impl_->first_element(impl_->chunk(index), offset_bytes));
}

void AdamWSink::settle(std::uint32_t index) {
  if (impl_->staging != nullptr) impl_->staging->settle(index);
}

}  // namespace slidecore
