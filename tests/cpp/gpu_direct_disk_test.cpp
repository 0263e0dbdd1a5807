// Transfers through cuFile, over a fake library and the host backend: what arrives, what goes on after short transfers,
// what errors say, and that nothing is left open.

#include <dlfcn.h>

#include "fake_cufile/fake_cufile_control.h"
#include "io_support.h"
#include "slidecore/gpu_direct.h"

namespace slidecore {
namespace {

using namespace testing_support;

constexpr const char* kVariable = "SLIDECORE_CUFILE_LIBRARY";
constexpr std::size_t kStripe = 16384;

std::string fake_library(const std::string& file) {
  return (std::filesystem::read_symlink("/proc/self/exe").parent_path() / "fake_driver" / file).string();
}

// What a test reaches of the fake library, which stays loaded.
class Control {
 public:
  Control() : handle_(dlopen(fake_library("libfake_cufile.so").c_str(), RTLD_NOW | RTLD_LOCAL)) {}
  void fail(const char* function, long result, int error = 0, int skip = 0) {
    get<FakeCuFileFail>("fake_cufile_fail")(function, result, error, skip);
  }
  void properties(unsigned nvfs_major, unsigned status, unsigned features) {
    get<FakeCuFileProperties>("fake_cufile_properties")(nvfs_major, status, features);
  }
  FakeCuFileState live() { return get<FakeCuFileLive>("fake_cufile_live")(); }

 private:
  template <class Signature>
  Signature* get(const char* name) {
    return reinterpret_cast<Signature*>(dlsym(handle_, name));
  }
  void* handle_;
};

class GpuDirectDisk : public testing::Test {
 protected:
  void SetUp() override {
    const DirectoryFacts facts = inspect_directory(directories.names[0]);
    if (!facts.direct) GTEST_SKIP() << "direct transfers are needed: " << facts.why_not_direct;
    setenv(kVariable, fake_library("libfake_cufile.so").c_str(), 1);
    control = std::make_unique<Control>();
    before = control->live();
    storage = std::make_shared<Storage>(directories.names, StorageOptions{.stripe_bytes = kStripe});
  }
  void TearDown() override {
    unsetenv(kVariable);
    if (control == nullptr) return;
    const FakeCuFileState after = control->live();
    EXPECT_EQ(after.opens, before.opens);
    EXPECT_EQ(after.handles, before.handles);
  }
  std::shared_ptr<GpuDirect> open() { return std::make_shared<GpuDirect>(device, storage); }

  Directories directories{3};
  std::shared_ptr<Device> device = host_device();
  std::unique_ptr<Control> control;
  FakeCuFileState before{};
  std::shared_ptr<Storage> storage;
};

TEST_F(GpuDirectDisk, AnySizeComesBack) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  const auto direct = open();
  EXPECT_EQ(control->live().handles, 3);
  constexpr std::size_t kMost = 9 * kStripe + 4096;
  Transfers transfers(storage);
  std::uint64_t bytes = 0, ends = 0;
  for (const std::size_t size : {std::size_t{1}, std::size_t{4095}, std::size_t{4096}, kStripe, kMost - 1, kMost,
                                 draw<std::size_t>(random, 1, kMost), draw<std::size_t>(random, 1, kMost)}) {
    SCOPED_TRACE(size);
    const auto before_it = storage->allocate("before", 4096);  // so that regions begin anywhere in a stripe
    const auto region = storage->allocate("input", size);
    const auto neighbour = storage->allocate("neighbour", 4096);
    Memory other(4096, 0x5a), again(4096);
    transfers.wait(transfers.write(neighbour, 0, other.data(), 4096));
    Bytes saved = random_bytes(size, random), seen(size + 1, 0xee);
    direct->write(region, saved.data(), size);
    direct->read(region, seen.data(), size);
    EXPECT_EQ(seen.back(), 0xee) << "more was read than asked for";
    seen.pop_back();
    EXPECT_EQ(seen, saved);
    Memory through(size);  // what the other transfers read is the same
    transfers.wait(transfers.read(region, 0, through.data(), size));
    EXPECT_EQ(through.bytes(), saved);
    transfers.wait(transfers.read(neighbour, 0, again.data(), 4096));
    EXPECT_EQ(again.bytes(), other.bytes());
    bytes += size;
    ends += size % 4096;
  }
  const GpuDirect::Counters counters = direct->counters();
  EXPECT_EQ(counters.reads, 8u);
  EXPECT_EQ(counters.writes, 8u);
  EXPECT_EQ(counters.read_bytes, bytes);
  EXPECT_EQ(counters.written_bytes, bytes);
  EXPECT_EQ(counters.bounced_bytes, 2 * ends);
  EXPECT_EQ(counters.short_transfers, 0u);
  const FakeCuFileState now = control->live();
  EXPECT_EQ(counters.requests, static_cast<std::uint64_t>(now.reads - before.reads + now.writes - before.writes));
}

TEST_F(GpuDirectDisk, ShortTransfersContinue) {
  Random random(3);
  const auto direct = open();
  const std::size_t size = 2 * kStripe + 77;
  const auto region = storage->allocate("input", size);
  for (const long moved : {0L, 1L, 4095L, 4096L, 5000L, 12288L}) {
    SCOPED_TRACE(moved);
    const Bytes saved = random_bytes(size, random);
    Bytes seen(size);
    control->fail("cuFileWrite", moved);
    direct->write(region, saved.data(), size);
    control->fail("cuFileRead", moved, 0, 1);
    direct->read(region, seen.data(), size);
    EXPECT_EQ(seen, saved);
  }
  EXPECT_EQ(direct->counters().short_transfers, 12u);
  control->fail("cuFileRead", -1, EINTR);
  Bytes seen(size);
  direct->read(region, seen.data(), size);
}

TEST_F(GpuDirectDisk, FailuresSayWhereAndWhy) {
  const auto direct = open();
  const auto region = storage->allocate("saved input 7", 4 * kStripe);
  Bytes memory(4 * kStripe, 3);
  const std::string file = std::filesystem::path(storage->files()[0]).filename().string();
  control->fail("cuFileWrite", -5012);
  expect_error(Code::io,
               {"writing 'saved input 7'", file, "offset ", "16384 bytes", "CU_FILE_CUDA_POINTER_INVALID, 5012"},
               [&] { direct->write(region, memory.data(), memory.size()); });
  control->fail("cuFileRead", -1, ENOSPC);
  expect_error(Code::io, {"reading 'saved input 7'", file, "errno 28"},
               [&] { direct->read(region, memory.data(), memory.size()); });
  control->fail("cuFileRead", -5999);
  expect_error(Code::io, {"cuFile's error 5999"}, [&] { direct->read(region, memory.data(), memory.size()); });
  // It can go on: what failed is done, and nothing is in flight.
  direct->write(region, memory.data(), memory.size());
  expect_error(Code::invalid_argument, {"more than the region", "saved input 7"},
               [&] { direct->write(region, memory.data(), memory.size() + 1); });
  expect_error(Code::invalid_argument, {"needs memory"}, [&] { direct->write(region, nullptr, 1); });
  const Directories elsewhere;
  const auto other = std::make_shared<Storage>(elsewhere.names);
  const auto foreign = other->allocate("foreign", 4096);
  expect_error(Code::invalid_argument, {"not one of this Storage"}, [&] { direct->read(foreign, memory.data(), 1); });
}

// Neither zeros of a hole are read for what was written, nor is one made.
TEST_F(GpuDirectDisk, ATruncatedFileIsAnError) {
  const auto direct = open();
  const auto first = storage->allocate("first", kStripe), last = storage->allocate("last", 4 * kStripe);
  Bytes memory(4 * kStripe, 3);
  direct->write(first, memory.data(), kStripe);
  direct->write(last, memory.data(), memory.size());
  ASSERT_EQ(truncate(storage->files()[1].c_str(), 4096), 0);
  const std::vector<std::string> parts = {"at offset 4096 of " + storage->files()[1], "truncated"};
  expect_error(Code::io, parts, [&] { direct->write(last, memory.data(), memory.size()); });
  EXPECT_EQ(std::filesystem::file_size(storage->files()[1]), 4096u);
  expect_error(Code::io, parts, [&] { direct->read(first, memory.data(), kStripe); });  // of another drive
  expect_error(Code::io, parts, [&] { direct->read(last, memory.data(), memory.size()); });
  expect_error(Code::io, parts, [&] { direct->read(last, memory.data(), memory.size() - 1); });  // with an end
}

TEST_F(GpuDirectDisk, WhatCannotBeOpenedLeavesNothing) {
  const std::size_t threads = threads_now(), files = open_files();
  control->fail("cuFileDriverOpen", 5011, 100);
  expect_error(Code::unsupported, {"opening cuFile's driver", "libfake_cufile.so", "CU_FILE_CUDA_DRIVER_ERROR", "100"},
               [&] { open(); });
  control->fail("cuFileHandleRegister", 5008, 0, 2);  // two files are registered already
  expect_error(Code::unsupported, {"registering", "slidecore-swap", "CU_FILE_IO_NOT_SUPPORTED"}, [&] { open(); });
  EXPECT_EQ(control->live().handles, before.handles);
  EXPECT_EQ(control->live().opens, before.opens);
  setenv(kVariable, fake_library("libfake_cufile_incomplete.so").c_str(), 1);
  const Error error = error_of([&] { open(); });
  EXPECT_EQ(error.code(), Code::unsupported);
  for (const char* name : {"2 functions", "cuFileDriverGetProperties", "cuFileHandleDeregister"}) {
    EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
  }
  EXPECT_EQ(std::string(error.what()).find("cuFileRead"), std::string::npos) << error.what();
  setenv(kVariable, "/nowhere/libcufile.so.0", 1);
  expect_error(Code::unsupported, {"/nowhere/libcufile.so.0", kVariable}, [&] { open(); });
  expect_no_more_threads(threads);
  EXPECT_EQ(open_files(), files);
}

// A driver that somebody else in the process has opened is theirs to close.
TEST_F(GpuDirectDisk, AnOpenDriverIsUsedAndLeftOpen) {
  const auto first = open();
  const Directories elsewhere;
  control->fail("cuFileDriverOpen", 5026);
  GpuDirect(device, std::make_shared<Storage>(elsewhere.names));
  EXPECT_EQ(control->live().opens, before.opens + 1);
}

TEST_F(GpuDirectDisk, TheLibraryIsAlsoFoundByItsPath) {
  unsetenv(kVariable);
  expect_error(Code::unsupported, {"libcufile.so.0", "/nowhere/a.so", kVariable},
               [&] { inspect_cufile({"/nowhere/a.so"}); });
  const std::string path = fake_library("libfake_cufile.so");
  const CuFileFacts facts = inspect_cufile({"/nowhere/a.so", path});
  EXPECT_EQ(facts.library, path);
  EXPECT_EQ(facts.version, "1.14");
  EXPECT_EQ(control->live().opens, before.opens);
}

TEST_F(GpuDirectDisk, ItSaysWhichWayBytesGo) {
  const auto describe = [&](unsigned nvfs_major, unsigned status, unsigned features, bool direct) {
    control->properties(nvfs_major, status, features);
    const auto opened = open();
    EXPECT_EQ(opened->direct(), direct);
    return opened->describe();
  };
  EXPECT_NE(describe(0, 0x10, 0, false).find("compatibility mode"), std::string::npos);
  EXPECT_NE(describe(2, 0x10, 0, true).find("nvidia-fs 2.17"), std::string::npos);
  EXPECT_NE(describe(0, 1u << 11, 0, true).find("peer-to-peer"), std::string::npos);
  EXPECT_NE(describe(0, 0, 1u << 4, true).find("peer-to-peer"), std::string::npos);
  control->properties(0, 0, 0);
}

// A scheduler whose inputs go this way.
class DirectScheduler {
 public:
  DirectScheduler(std::shared_ptr<Device> device_, const std::shared_ptr<Storage>& storage_,
                  std::shared_ptr<GpuDirect> direct_)
      : device(std::move(device_)),
        storage(storage_),
        direct(std::move(direct_)),
        transfers(std::make_shared<Transfers>(storage)),
        slot_(device->alloc(64)),
        weight_(device, 64, true) {
    SchedulerOptions options{.piece_bytes = 4096, .ring_pieces = 3, .trace_spans = 4096};
    options.transfers = transfers;
    options.gpu_direct = direct;
    scheduler = std::make_unique<Scheduler>(device, std::vector<ChunkSpec>{{"block 0", weight_.data(), 64, 0}},
                                            std::vector<WindowSpec>{{{slot_}, 64}}, nullptr, options);
  }
  ~DirectScheduler() {
    scheduler.reset();
    device->free(slot_);
  }

  std::shared_ptr<Device> device;
  std::shared_ptr<Storage> storage;
  std::shared_ptr<GpuDirect> direct;
  std::shared_ptr<Transfers> transfers;
  std::unique_ptr<Scheduler> scheduler;

 private:
  void* slot_;
  HostBuffer weight_;
};

TEST_F(GpuDirectDisk, SavedInputsComeBackThroughTheLanes) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  DirectScheduler rig(device, storage, open());
  constexpr std::size_t kMost = 5 * kStripe + 17;
  void* const source = device->alloc(kMost);
  void* const target = device->alloc(kMost);
  const StreamHandle stream = device->create_stream();
  std::vector<std::shared_ptr<const Region>> regions;
  for (int i = 0; i < 3; ++i) regions.push_back(storage->allocate("input " + std::to_string(i), kMost));
  rig.scheduler->start_trace();
  std::uint64_t written = 0, read = 0;
  for (int round = 0; round < 8; ++round) {
    std::vector<std::unique_ptr<HostBuffer>> saved;
    std::vector<Ticket> tickets;
    for (const auto& region : regions) {
      saved.push_back(std::make_unique<HostBuffer>(device, draw<std::size_t>(random, 1, kMost), true));
      HostBuffer& input = *saved.back();
      randomize(input.data(), input.size(), random);
      // The copy is work on the stream that the lane must wait for, and the next one what must wait for the lane.
      device->to_device(source, input.data(), input.size(), stream);
      tickets.push_back(rig.scheduler->save_input(0, region, source, input.size(), stream));
      rig.scheduler->wait(tickets.back(), stream);
      written += input.size();
    }
    for (std::size_t i = regions.size(); i-- > 0;) {
      if (draw(random, 0, 3) == 0) continue;
      HostBuffer seen(device, saved[i]->size(), true);
      rig.scheduler->wait(rig.scheduler->fetch_input(0, target, regions[i], seen.size(), stream, tickets[i]), stream);
      device->to_host(seen.data(), target, seen.size(), stream);
      device->synchronize(stream);
      EXPECT_EQ(std::memcmp(seen.data(), saved[i]->data(), seen.size()), 0);
      read += seen.size();
    }
    device->synchronize(stream);
  }
  rig.scheduler->stop_trace();
  EXPECT_EQ(rig.direct->counters().written_bytes, written);
  EXPECT_EQ(rig.direct->counters().read_bytes, read);
  EXPECT_EQ(rig.transfers->counters().requests, 0u);
  std::uint64_t traced[2] = {0, 0};
  for (const Span& span : rig.scheduler->trace().spans()) {
    if (span.lane != Lane::disk) continue;
    EXPECT_GE(span.end_ns, span.start_ns);
    traced[span.kind == SpanKind::read ? 0 : 1] += span.bytes;
  }
  EXPECT_EQ(traced[0], read);
  EXPECT_EQ(traced[1], written);
  device->destroy_stream(stream);
  device->free(source);
  device->free(target);
}

TEST_F(GpuDirectDisk, AFailureIsRaisedAtTheNextCall) {
  const std::size_t threads = threads_now();
  Bytes memory(2 * kStripe, 1);
  for (const bool write : {true, false}) {
    DirectScheduler rig(device, storage, open());
    const auto region = storage->allocate("a saved input", memory.size());
    if (write) {
      control->fail("cuFileWrite", -1, EIO);
      rig.scheduler->save_input(0, region, memory.data(), memory.size(), 0);
    } else {
      rig.scheduler->synchronize_ticket(rig.scheduler->save_input(0, region, memory.data(), memory.size(), 0));
      control->fail("cuFileRead", -5010);
      rig.scheduler->fetch_input(0, memory.data(), region, memory.size(), 0);
    }
    expect_error(Code::io,
                 {write ? "download lane: save of an input of chunk 'block 0'" : "fetch of an input of chunk 'block 0'",
                  "slidecore-swap", "offset", write ? "errno 5" : "CU_FILE_NVFS_DRIVER_ERROR"},
                 [&] { rig.scheduler->synchronize(); });
    EXPECT_THROW(rig.scheduler->check(), Error);
  }
  expect_no_more_threads(threads);
}

}  // namespace
}  // namespace slidecore
