#include "workload.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

using slidecore::Phase;

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The mean of three after a warm-up, as the steps are measured: other work on the machine disturbs both alike.
template <class Body>
double mean_seconds(const Body& body) {
  body();
  const auto start = Clock::now();
  for (int i = 0; i < 3; ++i) body();
  return seconds_since(start) / 3;
}

void spin(std::uint64_t rounds) {
  static volatile std::uint64_t sink;  // keeps the loop
  std::uint64_t x = sink + 1;
  for (std::uint64_t i = 0; i < rounds; ++i) x = x * 6364136223846793005u + 1442695040888963407u;
  sink = x;
}

float initial_value(std::size_t chunk) {
  return static_cast<float>(chunk % 64);
}
float gradient_value(std::size_t buffer) {
  return static_cast<float>(buffer + 1);
}

}  // namespace

void SgdSink::consume(std::uint32_t chunk, std::size_t offset_bytes, const void* piece, std::size_t bytes) {
  float* weight = planes_[chunk] + offset_bytes / sizeof(float);
  const float* gradient = static_cast<const float*>(piece);
  for (std::size_t i = 0; i < bytes / sizeof(float); ++i) weight[i] -= kRate * gradient[i];
}

void Compute::calibrate(double seconds) {
  seconds_ = seconds;
  constexpr std::uint64_t kTrial = 4'000'000;
  rounds_ = static_cast<std::uint64_t>(kTrial * (seconds / mean_seconds([] { spin(kTrial); }))) + 1;
}

void Compute::run() const {
  if (on_host_) {
    spin(rounds_);
  } else {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds_));
  }
}

Workload::Workload(const Arguments& arguments)
    : arguments_(arguments),
      bytes_(arguments.chunk_mib << 20),
      device_(std::make_shared<slidecore::Device>(arguments.backend, 0)),
      compute_(device_->is_host()) {
  device_->bind_thread();
  // The host backend's stream 0 is this thread itself: waiting for a slot there blocks it, as it should.
  if (!device_->is_host()) stream_ = device_->create_stream();

  std::vector<float*> weights;
  for (std::size_t chunk = 0; chunk < arguments_.chunks; ++chunk) {
    planes_.push_back(std::make_unique<slidecore::HostBuffer>(device_, bytes_, true));
    weights.push_back(static_cast<float*>(planes_.back()->data()));
    expected_.push_back(initial_value(chunk));
    std::fill_n(weights.back(), bytes_ / sizeof(float), expected_.back());
  }
  sink_ = std::make_shared<SgdSink>(std::move(weights));
  sample_ = std::make_unique<slidecore::HostBuffer>(device_, 4096, true);
  landing_ = std::make_unique<slidecore::HostBuffer>(device_, bytes_, true);
  for (std::size_t i = 0; i < arguments_.window; ++i) slots_.push_back(device_->alloc(bytes_));
  for (std::size_t i = 0; i < kGradients; ++i) {
    gradients_.push_back(device_->alloc(bytes_));
    fill_gradient(i);
  }
  tickets_.assign(kGradients, 0);
}

Workload::~Workload() {
  for (void* slot : slots_) device_->free(slot);
  for (void* gradient : gradients_) device_->free(gradient);
  if (stream_ != 0) device_->destroy_stream(stream_);
}

// Each gradient buffer keeps one value, its own, so that a mixed-up download shows in the planes.
void Workload::fill_gradient(std::size_t buffer) {
  std::fill_n(static_cast<float*>(landing_->data()), bytes_ / sizeof(float), gradient_value(buffer));
  device_->to_device(gradients_[buffer], landing_->data(), bytes_, stream_);
  device_->synchronize(stream_);
}

AloneRates Workload::measure_alone() {
  const auto stream = device_->create_stream();
  const double chunks = static_cast<double>(planes_.size());
  AloneRates alone;
  alone.upload = mean_seconds([&] {
                   for (std::size_t i = 0; i < planes_.size(); ++i) {
                     device_->to_device(slots_[i % slots_.size()], planes_[i]->data(), bytes_, stream);
                   }
                   device_->synchronize(stream);
                 }) /
                 chunks;
  alone.download = mean_seconds([&] {
                     for (std::size_t i = 0; i < planes_.size(); ++i) {
                       device_->to_host(landing_->data(), gradients_[i % kGradients], bytes_, stream);
                     }
                     device_->synchronize(stream);
                   }) /
                   chunks;
  device_->destroy_stream(stream);

  std::memset(landing_->data(), 0, bytes_);  // a gradient of zero: measured, but nothing changes
  alone.update = mean_seconds([&] {
                   for (std::uint32_t i = 0; i < planes_.size(); ++i) sink_->consume(i, 0, landing_->data(), bytes_);
                 }) /
                 chunks;

  compute_.calibrate(arguments_.compute_ms > 0 ? arguments_.compute_ms / 1e3 : alone.upload);
  alone.compute = mean_seconds([&] {
                    for (std::size_t i = 0; i < planes_.size(); ++i) compute_.run();
                  }) /
                  chunks;
  return alone;
}

Together Workload::measure_together() {
  std::vector<slidecore::ChunkSpec> chunks;
  for (std::size_t i = 0; i < planes_.size(); ++i) {
    chunks.push_back({"chunk" + std::to_string(i), planes_[i]->data(), bytes_, 0});
  }
  slidecore::Scheduler scheduler(device_, chunks, {{slots_, bytes_}}, sink_);

  const auto count = static_cast<std::uint32_t>(chunks.size());
  std::vector<slidecore::Visit> schedule;
  for (std::uint32_t i = 0; i < count; ++i) schedule.push_back({i, Phase::forward});
  for (std::uint32_t i = count; i-- > 0;) schedule.push_back({i, Phase::backward, true, true});
  scheduler.set_schedule(schedule);

  step(scheduler);
  scheduler.start_trace();  // waits for the warm-up to end
  const auto before = scheduler.counters();
  compute_s_ = 0;
  const auto start = Clock::now();
  for (std::size_t i = 0; i < arguments_.steps; ++i) step(scheduler);
  scheduler.synchronize();

  Together together;
  together.seconds = seconds_since(start);
  together.compute_s = compute_s_;
  scheduler.stop_trace();
  together.trace = scheduler.trace().summary();
  together.counters = scheduler.counters();
  together.counters.uploads -= before.uploads;
  together.counters.upload_bytes -= before.upload_bytes;
  together.counters.gradients -= before.gradients;
  together.counters.gradient_bytes -= before.gradient_bytes;
  together.counters.unscheduled_visits -= before.unscheduled_visits;
  together.counters.visits -= before.visits;
  together.counters.hits -= before.hits;
  return together;
}

void Workload::step(slidecore::Scheduler& scheduler) {
  const auto count = static_cast<std::uint32_t>(planes_.size());
  for (std::uint32_t i = 0; i < count; ++i) visit(scheduler, i, Phase::forward);
  for (std::uint32_t i = count; i-- > 0;) visit(scheduler, i, Phase::backward);
}

void Workload::visit(slidecore::Scheduler& scheduler, std::uint32_t chunk, Phase phase) {
  const void* slot = scheduler.acquire(chunk, phase, stream_);
  check_slot(chunk, slot);  // ends after the upload, so the computation starts when a card's would
  const std::size_t buffer = next_gradient_;
  // A real backward would now write this buffer: its last download has to be over.
  if (phase == Phase::backward && tickets_[buffer] != 0) scheduler.wait(tickets_[buffer], stream_);
  const auto start = Clock::now();
  compute_.run();
  compute_s_ += seconds_since(start);
  if (phase == Phase::backward) {
    tickets_[buffer] = scheduler.submit_gradient(chunk, gradients_[buffer], bytes_, stream_);
    expected_[chunk] -= SgdSink::kRate * gradient_value(buffer);
    next_gradient_ = (buffer + 1) % kGradients;
  }
  scheduler.release(chunk, phase, stream_);
}

// The first, middle and last element that the visit sees must be those of the chunk's latest update.
void Workload::check_slot(std::uint32_t chunk, const void* slot) {
  const std::size_t offsets[] = {0, bytes_ / 2, bytes_ - sizeof(float)};
  float* sample = static_cast<float*>(sample_->data());
  for (std::size_t i = 0; i < 3; ++i) {
    device_->to_host(sample + i, static_cast<const char*>(slot) + offsets[i], sizeof(float), stream_);
  }
  device_->synchronize(stream_);
  for (std::size_t i = 0; i < 3; ++i) {
    if (sample[i] != expected_[chunk] && first_wrong_slot_.empty()) {
      first_wrong_slot_ = "a visit of chunk " + std::to_string(chunk) + " saw " + std::to_string(sample[i]) +
                          " at byte " + std::to_string(offsets[i]) + ", expected " + std::to_string(expected_[chunk]);
    }
  }
}

std::string Workload::verify() const {
  if (!first_wrong_slot_.empty()) return first_wrong_slot_;
  for (std::size_t chunk = 0; chunk < planes_.size(); ++chunk) {
    const float* plane = static_cast<const float*>(planes_[chunk]->data());
    for (std::size_t i = 0; i < bytes_ / sizeof(float); ++i) {
      if (plane[i] != expected_[chunk]) {
        return "element " + std::to_string(i) + " of chunk " + std::to_string(chunk) + " is " +
               std::to_string(plane[i]) + ", expected " + std::to_string(expected_[chunk]);
      }
    }
  }
  return "";
}
