#include "slidecore/io.h"

#include <algorithm>
#include <mutex>
#include <optional>
#include <utility>

#include "bindings.h"
#include "io_handles.h"
#include "slidecore/status.h"

namespace slidecore::bindings {
namespace {

// The interpreter destroys what modules still hold at its end, or not: files must go in either case.
class AtExit {
 public:
  void add(const std::shared_ptr<Storage>& storage) {
    const std::lock_guard lock(mutex_);
    std::erase_if(storages_, [](const auto& entry) { return entry.expired(); });
    storages_.push_back(storage);
  }
  void run() {
    const std::lock_guard lock(mutex_);
    for (const auto& entry : storages_) {
      if (const auto storage = entry.lock()) storage->remove_files();
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::weak_ptr<Storage>> storages_;
};

py::dict counters_of(const Transfers& transfers) {
  const Transfers::Counters c = transfers.counters();
  py::dict out;
  out["reads"] = c.reads;
  out["read_bytes"] = c.read_bytes;
  out["writes"] = c.writes;
  out["written_bytes"] = c.written_bytes;
  out["requests"] = c.requests;
  out["bounced_bytes"] = c.bounced_bytes;
  out["short_transfers"] = c.short_transfers;
  out["retries"] = c.retries;
  return out;
}

void bind_facts(py::module_& m) {
  py::class_<DirectoryFacts>(m, "DirectoryFacts")
      .def_readonly("directory", &DirectoryFacts::directory)
      .def_readonly("filesystem", &DirectoryFacts::filesystem)
      .def_readonly("in_memory", &DirectoryFacts::in_memory)
      .def_readonly("direct", &DirectoryFacts::direct)
      .def_readonly("why_not_direct", &DirectoryFacts::why_not_direct)
      .def_readonly("alignment_reported", &DirectoryFacts::alignment_reported)
      .def_readonly("memory_alignment", &DirectoryFacts::memory_alignment)
      .def_readonly("offset_alignment", &DirectoryFacts::offset_alignment)
      .def_readonly("free_bytes", &DirectoryFacts::free_bytes)
      .def_readonly("total_bytes", &DirectoryFacts::total_bytes)
      .def_readonly("device_major", &DirectoryFacts::device_major)
      .def_readonly("device_minor", &DirectoryFacts::device_minor);
  m.def("inspect_directory", &inspect_directory, py::arg("directory"), ReleaseGil());
  m.def("why_no_io_uring", &why_no_io_uring, ReleaseGil());
}

void bind_storage(py::module_& m) {
  const auto at_exit = std::make_shared<AtExit>();
  py::module_::import("atexit").attr("register")(py::cpp_function([at_exit] { at_exit->run(); }));
  py::class_<Region, RegionPointer>(m, "Region")
      .def_property_readonly("name", &Region::name)
      .def("__len__", &Region::size);
  py::class_<StorageHandle>(m, "Storage")
      .def(py::init([at_exit](const std::vector<std::string>& directories, std::size_t stripe_bytes) {
             std::shared_ptr<Storage> storage;
             {
               const py::gil_scoped_release release;
               StorageOptions options;
               options.stripe_bytes = stripe_bytes;
               storage = std::make_shared<Storage>(directories, options);
             }
             at_exit->add(storage);
             return StorageHandle("the storage", storage);
           }),
           py::arg("directories"), py::kw_only(), py::arg("stripe_bytes") = StorageOptions{}.stripe_bytes)
      .def(
          "reserve", [](const StorageHandle& s, std::uint64_t bytes) { s.get().reserve(bytes); }, py::arg("nbytes"),
          ReleaseGil())
      .def(
          "allocate",
          [](const StorageHandle& s, const std::string& name, std::uint64_t bytes) {
            // Python has no const; nothing of a Region can be changed from there.
            return std::const_pointer_cast<Region>(s.get().allocate(name, bytes));
          },
          py::arg("name"), py::arg("nbytes"), ReleaseGil())
      .def(
          "trim", [](const StorageHandle& s) { s.get().trim(); }, ReleaseGil())
      .def_property_readonly("reserved_bytes", [](const StorageHandle& s) { return s.get().reserved_bytes(); })
      .def_property_readonly("allocated_bytes", [](const StorageHandle& s) { return s.get().allocated_bytes(); })
      .def_property_readonly("alignment", [](const StorageHandle& s) { return s.get().alignment(); })
      .def_property_readonly("memory_alignment", [](const StorageHandle& s) { return s.get().memory_alignment(); })
      .def_property_readonly("directories", [](const StorageHandle& s) { return s.get().directories(); })
      .def_property_readonly("files", [](const StorageHandle& s) { return s.get().files(); })
      .def("describe", [](const StorageHandle& s) { return s.get().describe(); })
      .def(
          "close",
          [](StorageHandle& s) {
            try {
              s.get().remove_files();
            } catch (const Error&) {
              return;  // closed before
            }
            s.close();
          },
          ReleaseGil());
}

void bind_transfers(py::module_& m) {
  const TransferOptions defaults;
  py::class_<TransfersHandle>(m, "Transfers")
      .def(py::init([](const StorageHandle& storage, const std::string& backend, std::size_t block_bytes,
                       std::size_t queue_depth, double patience_s) {
             return TransfersHandle("the transfers", std::make_shared<Transfers>(
                                                         storage.shared(), TransferOptions{backend, block_bytes,
                                                                                           queue_depth, patience_s}));
           }),
           py::arg("storage"), py::kw_only(), py::arg("backend") = defaults.backend,
           py::arg("block_bytes") = defaults.block_bytes, py::arg("queue_depth") = defaults.queue_depth,
           py::arg("patience_s") = defaults.patience_s, ReleaseGil())
      .def(
          "read",
          [](const TransfersHandle& t, const RegionPointer& region, std::uint64_t offset, std::uintptr_t memory,
             std::size_t bytes) { return t.get().read(region, offset, pointer<void>(memory), bytes); },
          py::arg("region"), py::arg("offset"), py::arg("memory"), py::arg("nbytes"), ReleaseGil())
      .def(
          "write",
          [](const TransfersHandle& t, const RegionPointer& region, std::uint64_t offset, std::uintptr_t memory,
             std::size_t bytes) { return t.get().write(region, offset, pointer<const void>(memory), bytes); },
          py::arg("region"), py::arg("offset"), py::arg("memory"), py::arg("nbytes"), ReleaseGil())
      .def(
          "done", [](const TransfersHandle& t, Ticket ticket) { return t.get().done(ticket); }, py::arg("ticket"),
          ReleaseGil())
      .def(
          "wait", [](const TransfersHandle& t, Ticket ticket) { t.get().wait(ticket); }, py::arg("ticket"),
          ReleaseGil())
      .def(
          "synchronize", [](const TransfersHandle& t) { t.get().synchronize(); }, ReleaseGil())
      .def(
          "check", [](const TransfersHandle& t) { t.get().check(); }, ReleaseGil())
      .def(
          "register_memory",
          [](const TransfersHandle& t, std::uintptr_t memory, std::size_t bytes) {
            return t.get().register_memory(pointer<void>(memory), bytes);
          },
          py::arg("memory"), py::arg("nbytes"), ReleaseGil())
      .def(
          "unregister_memory",
          [](const TransfersHandle& t, std::uintptr_t memory) { t.get().unregister_memory(pointer<void>(memory)); },
          py::arg("memory"), ReleaseGil())
      .def_property_readonly("backend", [](const TransfersHandle& t) { return std::string(t.get().backend()); })
      .def_property_readonly("block_bytes", [](const TransfersHandle& t) { return t.get().block_bytes(); })
      .def_property_readonly("queue_depth", [](const TransfersHandle& t) { return t.get().queue_depth(); })
      .def("describe", [](const TransfersHandle& t) { return t.get().describe(); })
      .def("counters", [](const TransfersHandle& t) { return counters_of(t.get()); })
      .def("close", &TransfersHandle::close, ReleaseGil());
}

}  // namespace

void bind_io(py::module_& m) {
  bind_facts(m);
  bind_storage(m);
  bind_transfers(m);
}

}  // namespace slidecore::bindings
