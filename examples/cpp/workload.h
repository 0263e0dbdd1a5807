#pragma once
// What the example moves and computes: planes on the host, a window and two gradient buffers on the device,
// a computation that takes time, and an update that can be checked.

#include <slidecore/device.h>
#include <slidecore/memory.h>
#include <slidecore/scheduler.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "arguments.h"

// plane -= kRate * gradient, piece by piece on the update lane.
class SgdSink : public slidecore::GradientSink {
 public:
  explicit SgdSink(std::vector<float*> planes) : planes_(std::move(planes)) {}
  void begin(std::uint32_t) override {}
  void consume(std::uint32_t chunk, std::size_t offset_bytes, const void* piece, std::size_t bytes) override;
  void end(std::uint32_t) override {}

  static constexpr float kRate = 0.25f;  // a power of two: every result is exact

 private:
  const std::vector<float*> planes_;
};

// Stands for the kernels of a visit. On the host backend a fixed amount of arithmetic on the calling thread, which
// therefore gets slower where it shares the machine with the lanes; on a card the wait of a thread whose card is busy.
class Compute {
 public:
  explicit Compute(bool on_host) : on_host_(on_host) {}
  void calibrate(double seconds);
  void run() const;

 private:
  const bool on_host_;
  double seconds_ = 0;
  std::uint64_t rounds_ = 0;
};

struct AloneRates {  // seconds for one chunk (compute: for one visit), with nothing else running
  double upload = 0, download = 0, update = 0, compute = 0;
};

struct Together {
  double seconds = 0;    // all measured steps, until the last update is done
  double compute_s = 0;  // of them, in the computation
  slidecore::TraceSummary trace;
  slidecore::Scheduler::Counters counters;  // of the measured steps
};

class Workload {
 public:
  explicit Workload(const Arguments& arguments);
  ~Workload();
  Workload(const Workload&) = delete;
  Workload& operator=(const Workload&) = delete;

  AloneRates measure_alone();
  Together measure_together();
  std::string verify() const;  // what is wrong with the planes or was wrong in a slot; empty if nothing

  std::string device_name() const { return device_->info().name; }
  std::size_t chunk_bytes() const { return bytes_; }

 private:
  void step(slidecore::Scheduler& scheduler);
  void visit(slidecore::Scheduler& scheduler, std::uint32_t chunk, slidecore::Phase phase);
  void check_slot(std::uint32_t chunk, const void* slot);
  void fill_gradient(std::size_t buffer);

  const Arguments arguments_;
  const std::size_t bytes_;
  const std::shared_ptr<slidecore::Device> device_;
  slidecore::StreamHandle stream_ = 0;  // where the computation runs
  Compute compute_;
  std::vector<std::unique_ptr<slidecore::HostBuffer>> planes_;
  std::unique_ptr<slidecore::HostBuffer> sample_, landing_;
  std::vector<float> expected_;  // value of every element of each plane
  std::vector<void*> slots_;
  static constexpr std::size_t kGradients = 2;  // one is computed while the other goes down
  std::vector<void*> gradients_;
  std::vector<slidecore::Ticket> tickets_;
  std::size_t next_gradient_ = 0;
  std::shared_ptr<SgdSink> sink_;
  double compute_s_ = 0;
  std::string first_wrong_slot_;
};
