#include "slidecore/scheduler.h"

#include <map>
#include <tuple>
#include <type_traits>

#include "bindings.h"
#include "io_handles.h"
#include "slidecore/adamw_sink.h"
#include "slidecore/status.h"

namespace slidecore::bindings {
namespace {

// Lets close() end the lanes while Python objects still refer to the scheduler. The mutex-free check is enough:
// close() is called by the thread that owns the model.
class Handle {
 public:
  Handle(std::unique_ptr<Scheduler> scheduler, std::shared_ptr<AdamWSink> sink)
      : scheduler_(std::move(scheduler)), sink_(std::move(sink)) {}
  Scheduler& get() const {
    if (!scheduler_) throw Error(Code::state, "the scheduler is closed");
    return *scheduler_;
  }
  // Prepares the sink and submits. A signal of Python cannot come between the two, nor can an error leave what was
  // prepared behind: the chunk's next submission would be applied by it.
  template <class Prepare, class Submit>
  auto submit(std::uint32_t chunk, const Prepare& prepare, const Submit& submit) const {
    Scheduler& scheduler = get();
    if (sink_ == nullptr) throw Error(Code::state, "the scheduler has no sink for gradients");
    prepare(*sink_);
    try {
      return submit(scheduler);
    } catch (...) {
      sink_->withdraw(chunk);
      throw;
    }
  }
  void close() {
    if (!scheduler_) return;
    try {
      scheduler_->synchronize();
    } catch (const Error&) {
      // A failed lane was reported to the call that met it; closing is still possible.
    }
    scheduler_.reset();
    sink_.reset();  // its stages hold the transfers, and these their threads and files
  }

 private:
  std::unique_ptr<Scheduler> scheduler_;
  std::shared_ptr<AdamWSink> sink_;
};

using ChunkTuple = std::tuple<std::string, std::uintptr_t, std::size_t, std::uint32_t>;
using RegionsByName = std::map<std::string, RegionPointer>;
using WindowTuple = std::pair<std::vector<std::uintptr_t>, std::size_t>;
using VisitTuple = std::tuple<std::uint32_t, int, bool, bool>;

std::unique_ptr<Handle> make_scheduler(std::shared_ptr<Device> device, const std::vector<ChunkTuple>& chunks,
                                       const std::vector<WindowTuple>& windows, std::shared_ptr<AdamWSink> sink,
                                       std::size_t piece_bytes, std::size_t ring_pieces, std::size_t trace_spans,
                                       const TransfersHandle* transfers, std::size_t disk_pieces,
                                       const GpuDirectHandle* gpu_direct) {
  std::vector<ChunkSpec> chunk_specs;
  for (const auto& [name, weight, bytes, window] : chunks) {
    chunk_specs.push_back({name, pointer<const void>(weight), bytes, window});
  }
  std::vector<WindowSpec> window_specs;
  for (const auto& [slots, bytes] : windows) {
    WindowSpec spec{{}, bytes};
    for (const std::uintptr_t slot : slots) spec.slots.push_back(pointer<void>(slot));
    window_specs.push_back(std::move(spec));
  }
  SchedulerOptions options{piece_bytes, ring_pieces, trace_spans};
  if (transfers != nullptr) options.transfers = transfers->shared();
  options.disk_pieces = disk_pieces;
  if (gpu_direct != nullptr) options.gpu_direct = gpu_direct->shared();
  auto scheduler =
      std::make_unique<Scheduler>(std::move(device), std::move(chunk_specs), std::move(window_specs), sink, options);
  return std::make_unique<Handle>(std::move(scheduler), std::move(sink));
}

Phase phase_of(int phase) {
  if (phase != 0 && phase != 1)
    throw Error(Code::invalid_argument, "phase must be Scheduler.FORWARD or Scheduler.BACKWARD");
  return phase == 0 ? Phase::forward : Phase::backward;
}

py::dict summary_of(Scheduler& scheduler) {
  const TraceSummary summary = scheduler.trace().summary();
  py::dict lanes;
  for (int i = 0; i < kLanes; ++i) {
    const LaneSummary& lane = summary.lanes[i];
    py::dict entry;
    entry["busy_s"] = lane.busy_s;
    entry["busy_share"] = lane.busy_share;
    entry["bytes"] = lane.bytes;
    entry["spans"] = lane.spans;
    lanes[lane_name(static_cast<Lane>(i))] = entry;
  }
  py::dict out;
  out["wall_s"] = summary.wall_s;
  out["exposed_wait_s"] = summary.exposed_wait_s;
  out["dropped"] = summary.dropped;
  out["lanes"] = lanes;
  return out;
}

GradientType gradient_type(bool float32) {
  return float32 ? GradientType::float32 : GradientType::bfloat16;
}

// Planes by name, as AdamWSink's add_chunk() has them: moments that come with scales are 8-bit codes.
void place(AdamWSink& sink, std::uint32_t chunk, const std::map<std::string, std::uintptr_t>& memory,
           const RegionsByName& disk) {
  AdamWPlanes planes;
  AdamWRegions regions;
  std::size_t known = 0;
  const auto take = [&](const char* name, auto& plane, auto& region) {
    if (const auto found = memory.find(name); found != memory.end()) {
      plane = pointer<std::remove_pointer_t<std::remove_reference_t<decltype(plane)>>>(found->second);
      ++known;
    }
    if (const auto found = disk.find(name); found != disk.end()) {
      region = found->second;
      ++known;
    }
  };
  take("weight", planes.weight, regions.weight);
  take("residual", planes.residual, regions.residual);
  take("weight32", planes.weight32, regions.weight32);
  if (memory.contains("exp_avg_scale") || disk.contains("exp_avg_scale")) {
    take("exp_avg", planes.exp_avg8, regions.exp_avg8);
    take("exp_avg_sq", planes.exp_avg_sq8, regions.exp_avg_sq8);
  } else {
    take("exp_avg", planes.exp_avg, regions.exp_avg);
    take("exp_avg_sq", planes.exp_avg_sq, regions.exp_avg_sq);
  }
  take("exp_avg_scale", planes.exp_avg_scale, regions.exp_avg_scale);
  take("exp_avg_sq_scale", planes.exp_avg_sq_scale, regions.exp_avg_sq_scale);
  if (known != memory.size() + disk.size()) throw Error(Code::invalid_argument, "there is no plane of that name");
  sink.place(chunk, planes, regions);
}

using SegmentTuple = std::tuple<std::size_t, std::size_t, AdamWHyper>;
using SumSegmentTuple = std::tuple<std::size_t, std::size_t, bool>;

std::vector<AdamWSink::Segment> table_of(const std::vector<SegmentTuple>& segments) {
  std::vector<AdamWSink::Segment> table;
  for (const auto& [offset, length, hyper] : segments) table.push_back({offset, length, hyper});
  return table;
}

std::vector<AdamWSink::SumSegment> table_of(const std::vector<SumSegmentTuple>& segments) {
  std::vector<AdamWSink::SumSegment> table;
  for (const auto& [offset, length, first] : segments) table.push_back({offset, length, first});
  return table;
}

void bind_sink(py::module_& m) {
  py::class_<AdamWSink, std::shared_ptr<AdamWSink>>(m, "AdamWSink")
      .def(py::init<std::shared_ptr<ThreadPool>>(), py::arg("pool"))
      .def(
          "add_chunk",
          [](AdamWSink& sink, std::size_t n, bool gradient_float32) {
            return sink.add_chunk(n, gradient_type(gradient_float32));
          },
          py::kw_only(), py::arg("n"), py::arg("gradient_float32"))
      .def(
          "use_disk",
          [](AdamWSink& sink, const TransfersHandle& transfers, std::shared_ptr<Device> device, std::size_t stages,
             std::size_t stage_elements) {
            sink.use_disk(transfers.shared(), std::move(device), stages, stage_elements);
          },
          py::arg("transfers"), py::arg("device"), py::kw_only(), py::arg("stages"), py::arg("stage_elements"),
          ReleaseGil())
      .def("place", &place, py::arg("chunk"), py::kw_only(), py::arg("memory"), py::arg("disk"))
      .def_property_readonly("staging_bytes", &AdamWSink::staging_bytes)
      .def("squares", &AdamWSink::squares, py::arg("chunk"));
}

}  // namespace

void bind_scheduler(py::module_& m) {
  bind_sink(m);
  const SchedulerOptions defaults;
  py::class_<Handle> scheduler(m, "Scheduler");
  scheduler.attr("FORWARD") = 0;
  scheduler.attr("BACKWARD") = 1;
  scheduler
      .def(py::init(&make_scheduler), py::arg("device"), py::arg("chunks"), py::arg("windows"), py::arg("sink"),
           py::arg("piece_bytes") = defaults.piece_bytes, py::arg("ring_pieces") = defaults.ring_pieces,
           py::arg("trace_spans") = defaults.trace_spans, py::arg("transfers") = nullptr,
           py::arg("disk_pieces") = defaults.disk_pieces, py::arg("gpu_direct") = nullptr, ReleaseGil())
      .def(
          "set_schedule",
          [](const Handle& s, const std::vector<VisitTuple>& visits) {
            std::vector<Visit> schedule;
            for (const auto& [chunk, phase, weights, updates] : visits) {
              schedule.push_back({chunk, phase_of(phase), weights, updates});
            }
            s.get().set_schedule(std::move(schedule));
          },
          py::arg("visits"))
      .def(
          "acquire",
          [](const Handle& s, std::uint32_t chunk, int phase, StreamHandle stream) {
            std::uintptr_t slot = 0;
            {
              const py::gil_scoped_release release;
              slot = address(s.get().acquire(chunk, phase_of(phase), stream));
            }
            // Ctrl-C while it waited is raised here, not once this has returned: nobody would release the visit then.
            if (PyErr_CheckSignals() != 0) {
              const py::error_already_set interrupt;
              {
                const py::gil_scoped_release release;
                s.get().release(chunk, phase_of(phase), stream);
              }
              throw interrupt;
            }
            return slot;
          },
          py::arg("chunk"), py::arg("phase"), py::arg("stream"))
      .def(
          "release",
          [](const Handle& s, std::uint32_t chunk, int phase, StreamHandle stream) {
            s.get().release(chunk, phase_of(phase), stream);
          },
          py::arg("chunk"), py::arg("phase"), py::arg("stream"), ReleaseGil())
      .def(
          "submit_gradient",
          [](const Handle& s, std::uint32_t chunk, const std::vector<SegmentTuple>& segments, bool float32,
             std::uintptr_t gradient, std::size_t bytes, StreamHandle stream) {
            return s.submit(
                chunk, [&](AdamWSink& sink) { sink.prepare(chunk, table_of(segments), gradient_type(float32)); },
                [&](Scheduler& scheduler) {
                  return scheduler.submit_gradient(chunk, pointer<const void>(gradient), bytes, stream);
                });
          },
          py::arg("chunk"), py::arg("segments"), py::arg("gradient_float32"), py::arg("gradient"), py::arg("nbytes"),
          py::arg("stream"), ReleaseGil())
      .def(
          "add_gradient",
          [](const Handle& s, std::uint32_t chunk, const std::vector<SumSegmentTuple>& segments, std::uintptr_t sum,
             bool float32, std::uintptr_t gradient, std::size_t bytes, StreamHandle stream) {
            return s.submit(
                chunk,
                [&](AdamWSink& sink) {
                  sink.prepare_sum(chunk, table_of(segments), pointer<float>(sum), gradient_type(float32));
                },
                [&](Scheduler& scheduler) {
                  return scheduler.add_gradient(chunk, pointer<const void>(gradient), bytes, stream);
                });
          },
          py::arg("chunk"), py::arg("segments"), py::arg("sum"), py::arg("gradient_float32"), py::arg("gradient"),
          py::arg("nbytes"), py::arg("stream"), ReleaseGil())
      .def(
          "save_gradient",
          [](const Handle& s, std::uint32_t chunk, std::uintptr_t host, std::uintptr_t gradient, std::size_t bytes,
             StreamHandle stream) {
            return s.get().save_gradient(chunk, pointer<void>(host), pointer<const void>(gradient), bytes, stream);
          },
          py::arg("chunk"), py::arg("host"), py::arg("gradient"), py::arg("nbytes"), py::arg("stream"), ReleaseGil())
      .def(
          "update",
          [](const Handle& s, std::uint32_t chunk, const std::vector<SegmentTuple>& segments, bool float32,
             std::uintptr_t gradient, std::size_t bytes, Ticket after) {
            s.submit(
                chunk, [&](AdamWSink& sink) { sink.prepare(chunk, table_of(segments), gradient_type(float32)); },
                [&](Scheduler& scheduler) { scheduler.update(chunk, pointer<const void>(gradient), bytes, after); });
          },
          py::arg("chunk"), py::arg("segments"), py::arg("gradient_float32"), py::arg("gradient"), py::arg("nbytes"),
          py::arg("after"), ReleaseGil())
      .def(
          "save_input",
          [](const Handle& s, std::int32_t chunk, std::uintptr_t host, std::uintptr_t device, std::size_t bytes,
             StreamHandle stream) {
            return s.get().save_input(chunk, pointer<void>(host), pointer<const void>(device), bytes, stream);
          },
          py::arg("chunk"), py::arg("host"), py::arg("device"), py::arg("nbytes"), py::arg("stream"), ReleaseGil())
      .def(
          "fetch_input",
          [](const Handle& s, std::int32_t chunk, std::uintptr_t device, std::uintptr_t host, std::size_t bytes,
             StreamHandle stream, Ticket after) {
            return s.get().fetch_input(chunk, pointer<void>(device), pointer<const void>(host), bytes, stream, after);
          },
          py::arg("chunk"), py::arg("device"), py::arg("host"), py::arg("nbytes"), py::arg("stream"),
          py::arg("after") = 0, ReleaseGil())
      .def(
          "save_input_to_disk",
          [](const Handle& s, std::int32_t chunk, const RegionPointer& on_disk, std::uintptr_t device,
             std::size_t bytes, StreamHandle stream) {
            return s.get().save_input(chunk, on_disk, pointer<const void>(device), bytes, stream);
          },
          py::arg("chunk"), py::arg("on_disk"), py::arg("device"), py::arg("nbytes"), py::arg("stream"), ReleaseGil())
      .def(
          "fetch_input_from_disk",
          [](const Handle& s, std::int32_t chunk, std::uintptr_t device, const RegionPointer& on_disk,
             std::size_t bytes, StreamHandle stream,
             Ticket after) { return s.get().fetch_input(chunk, pointer<void>(device), on_disk, bytes, stream, after); },
          py::arg("chunk"), py::arg("device"), py::arg("on_disk"), py::arg("nbytes"), py::arg("stream"),
          py::arg("after") = 0, ReleaseGil())
      .def(
          "done", [](const Handle& s, Ticket t) { return s.get().done(t); }, py::arg("ticket"), ReleaseGil())
      .def(
          "wait", [](const Handle& s, Ticket t, StreamHandle stream) { s.get().wait(t, stream); }, py::arg("ticket"),
          py::arg("stream"), ReleaseGil())
      .def(
          "synchronize_ticket", [](const Handle& s, Ticket t) { s.get().synchronize_ticket(t); }, py::arg("ticket"),
          ReleaseGil())
      .def(
          "place_weight",
          [](const Handle& s, std::uint32_t chunk, std::uintptr_t weight, const RegionPointer& on_disk) {
            s.get().place_weight(chunk, pointer<const void>(weight), on_disk);
          },
          py::arg("chunk"), py::arg("weight"), py::arg("on_disk") = nullptr)
      .def(
          "invalidate", [](const Handle& s, std::uint32_t chunk) { s.get().invalidate(chunk); }, py::arg("chunk"))
      .def(
          "wait_updates", [](const Handle& s) { s.get().wait_updates(); }, ReleaseGil())
      .def(
          "synchronize", [](const Handle& s) { s.get().synchronize(); }, ReleaseGil())
      .def("check", [](const Handle& s) { s.get().check(); })
      .def("close", &Handle::close, ReleaseGil())
      .def(
          "start_trace", [](const Handle& s) { s.get().start_trace(); }, ReleaseGil())
      .def(
          "stop_trace", [](const Handle& s) { s.get().stop_trace(); }, ReleaseGil())
      .def("chrome_trace", [](const Handle& s) { return s.get().chrome_trace(); })
      .def("trace_spans",
           [](const Handle& s) {
             py::list out;
             for (const Span& span : s.get().trace().spans()) {
               out.append(py::make_tuple(lane_name(span.lane), span_kind_name(span.kind), span.chunk, span.start_ns,
                                         span.end_ns, span.bytes));
             }
             return out;
           })
      .def("trace_summary", [](const Handle& s) { return summary_of(s.get()); })
      .def("counters", [](const Handle& s) {
        const Scheduler::Counters c = s.get().counters();
        py::dict out;
        out["uploads"] = c.uploads;
        out["upload_bytes"] = c.upload_bytes;
        out["gradients"] = c.gradients;
        out["gradient_bytes"] = c.gradient_bytes;
        out["unscheduled_visits"] = c.unscheduled_visits;
        out["visits"] = c.visits;
        out["hits"] = c.hits;
        return out;
      });
}

}  // namespace slidecore::bindings
