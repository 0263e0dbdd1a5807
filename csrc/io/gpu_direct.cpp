#include "slidecore/gpu_direct.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "device/cufile.h"
#include "io/errors.h"
#include "io/storage_impl.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

constexpr int kAttempts = 12;  // in a row that move less than a block

// Whether a call that failed may be made again, after a pause that grows with the attempts: to 4 s in all.
bool again(std::int64_t result, int& attempts) {
  if ((result != -EINTR && result != -EAGAIN) || ++attempts == kAttempts) return false;
  std::this_thread::sleep_for(std::chrono::milliseconds(1 << attempts >> 1));
  return true;
}

// Runs the work on a thread of its own, with the device current there: neither cuFile nor this class shall change
// what is current on the caller's thread.
template <class Work>
std::jthread on_device(const Device& device, std::exception_ptr& failure, Work work) {
  return std::jthread([&device, &failure, work] {
    try {
      device.bind_thread();
      work();
    } catch (...) {
      failure = std::current_exception();
    }
  });
}

// A part of a range that lies in one piece in one file.
struct Extent {
  std::uint64_t file_offset;
  std::size_t memory_offset, bytes;
};

}  // namespace

struct GpuDirect::Impl {
  Impl(std::shared_ptr<Device> device, std::shared_ptr<Storage> storage, const std::vector<std::string>& paths);
  ~Impl();

  void open(const std::vector<std::string>& paths);
  void close();
  void transfer(bool write, const Region& region, char* memory, std::size_t bytes);
  void transfer_extent(bool write, std::size_t drive, const Region& region, char* memory, const Extent& extent);
  void transfer_end(bool write, const Region& region, char* memory, std::size_t at, std::size_t bytes);
  [[noreturn]] void fail(bool write, const Region& region, std::size_t drive, std::uint64_t offset, std::size_t bytes,
                         const std::string& why) const;

  const std::shared_ptr<Device> device;
  const std::shared_ptr<Storage> storage;
  Storage::Impl& files;
  const pid_t owner = getpid();
  std::optional<device::CuFileDriver> driver;
  std::vector<device::cufile::Handle> handles;  // of each file
  StreamHandle stream = 0;                      // for the copies of ends
  std::atomic<std::uint64_t> reads{0}, read_bytes{0}, writes{0}, written_bytes{0};
  std::atomic<std::uint64_t> requests{0}, bounced{0}, shorts{0};
};

GpuDirect::Impl::Impl(std::shared_ptr<Device> device_, std::shared_ptr<Storage> storage_,
                      const std::vector<std::string>& paths)
    : device(std::move(device_)), storage(std::move(storage_)), files(*storage->impl_) {
  for (const DirectoryFacts& facts : files.facts) {
    if (facts.direct) continue;
    throw Error(Code::unsupported,
                "cuFile needs direct transfers, which " + facts.directory + " does not take: " + facts.why_not_direct);
  }
  std::exception_ptr failure;
  on_device(*device, failure, [&] { open(paths); }).join();
  if (failure != nullptr) {
    close();
    std::rethrow_exception(failure);
  }
}

void GpuDirect::Impl::open(const std::vector<std::string>& paths) {
  driver.emplace(device::CuFileLibrary(paths));
  for (const auto& file : files.files) handles.push_back(driver->add_file(file->fd(), file->path()));
  stream = device->create_stream();
}

void GpuDirect::Impl::close() {
  if (stream != 0) {
    try {
      device->destroy_stream(std::exchange(stream, 0));
    } catch (const Error&) {
      // It went with the device.
    }
  }
  if (!driver.has_value()) return;
  const auto work = [&] {
    for (const device::cufile::Handle handle : std::exchange(handles, {})) driver->remove_file(handle);
    driver.reset();
  };
  std::exception_ptr ignored;
  try {
    on_device(*device, ignored, work).join();
  } catch (const std::system_error&) {
    work();  // no thread to be had
  }
}

GpuDirect::Impl::~Impl() {
  close();
}

void GpuDirect::Impl::fail(bool write, const Region& region, std::size_t drive, std::uint64_t offset, std::size_t bytes,
                           const std::string& why) const {
  throw Error(Code::io, std::string(write ? "writing" : "reading") + " '" + region.name() + "': " + files.paths[drive] +
                            " at offset " + std::to_string(offset) + ", " + io::size_text(bytes) +
                            ", between device memory and disk (cuFile): " + why);
}

void GpuDirect::Impl::transfer(bool write, const Region& region, char* memory, std::size_t bytes) {
  if (write) files.check_files(true, region);
  const std::size_t whole = bytes - bytes % files.unit;
  std::vector<std::vector<Extent>> extents(files.files.size());
  for (std::size_t at = 0; at < whole;) {
    const Storage::Impl::Place place = files.place(region.base() + at);
    const auto length = static_cast<std::size_t>(std::min<std::uint64_t>(place.bytes, whole - at));
    extents[place.drive].push_back({place.offset, at, length});
    at += length;
  }
  // The first drive's share on this thread, the others' beside it. All are waited for whatever fails: nothing may be
  // in flight when the caller hears of it.
  std::vector<std::exception_ptr> failures(extents.size());
  const auto share = [&](std::size_t drive) {
    for (const Extent& extent : extents[drive]) transfer_extent(write, drive, region, memory, extent);
  };
  std::vector<std::jthread> threads;
  for (std::size_t drive = 1; drive < extents.size(); ++drive) {
    if (!extents[drive].empty()) threads.push_back(on_device(*device, failures[drive], [&, drive] { share(drive); }));
  }
  try {
    share(0);
    if (whole < bytes) transfer_end(write, region, memory, whole, bytes - whole);
  } catch (...) {
    failures[0] = std::current_exception();
  }
  threads.clear();                               // joins them
  if (!write) files.check_files(false, region);  // where a file is too short, that is why others failed
  for (const std::exception_ptr& failure : failures) {
    if (failure != nullptr) std::rethrow_exception(failure);
  }
}

void GpuDirect::Impl::transfer_extent(bool write, std::size_t drive, const Region& region, char* memory,
                                      const Extent& extent) {
  int attempts = 0;
  for (std::size_t at = 0; at < extent.bytes;) {
    const std::size_t left = extent.bytes - at;
    const std::uint64_t offset = extent.file_offset + at;
    ++requests;
    const std::int64_t moved = write ? driver->write(handles[drive], memory, left, offset, extent.memory_offset + at)
                                     : driver->read(handles[drive], memory, left, offset, extent.memory_offset + at);
    if (again(moved, attempts)) continue;
    if (moved < 0) fail(write, region, drive, offset, left, device::failure_text(moved));
    const auto done = std::min(static_cast<std::size_t>(moved), left);
    if (done == left) return;
    // What goes on begins with a whole block again.
    ++shorts;
    const std::size_t blocks = done - done % files.unit;
    at += blocks;
    attempts = blocks > 0 ? 0 : attempts + 1;
    if (attempts == kAttempts) {
      fail(write, region, drive, offset, left, "only " + std::to_string(done) + " bytes were moved, again and again");
    }
  }
}

void GpuDirect::Impl::transfer_end(bool write, const Region& region, char* memory, std::size_t at, std::size_t bytes) {
  const std::size_t unit = files.unit;
  const Storage::Impl::Place place = files.place(region.base() + at);
  const int fd = files.files[place.drive]->fd();
  const std::unique_ptr<char, decltype(&std::free)> block(static_cast<char*>(std::aligned_alloc(unit, unit)),
                                                          &std::free);
  if (block == nullptr) throw Error(Code::out_of_memory, "no memory for a block of " + io::size_text(unit));
  std::memset(block.get(), 0, unit);
  if (write) {
    device->to_host(block.get(), memory + at, bytes, stream);
    device->synchronize(stream);
  }
  int attempts = 0;
  for (std::size_t done = 0; done < unit;) {
    const long moved = write ? files.calls->pwrite(fd, block.get() + done, unit - done, place.offset + done)
                             : files.calls->pread(fd, block.get() + done, unit - done, place.offset + done);
    if (again(moved, attempts)) continue;
    if (moved <= 0) {
      fail(write, region, place.drive, place.offset + done, unit - done,
           device::failure_text(moved == 0 ? -EIO : moved));
    }
    done += static_cast<std::size_t>(moved);
    attempts = 0;
  }
  if (!write) {
    device->to_device(memory + at, block.get(), bytes, stream);
    device->synchronize(stream);
  }
  bounced += bytes;
}

CuFileFacts inspect_cufile(const std::vector<std::string>& paths) {
  const device::CuFileLibrary library(paths);
  return {library.path(), library.version()};
}

GpuDirect::GpuDirect(std::shared_ptr<Device> device, std::shared_ptr<Storage> storage,
                     const std::vector<std::string>& paths) {
  if (device == nullptr || storage == nullptr) {
    throw Error(Code::invalid_argument, "GpuDirect needs a device and a Storage");
  }
  impl_ = std::make_unique<Impl>(std::move(device), std::move(storage), paths);
}

GpuDirect::~GpuDirect() {
  if (getpid() != impl_->owner) static_cast<void>(impl_.release());  // driver and handles are the parent's
}

void GpuDirect::read(const std::shared_ptr<const Region>& region, void* device_memory, std::size_t bytes) {
  check(region, device_memory, bytes);
  impl_->transfer(false, *region, static_cast<char*>(device_memory), bytes);
  ++impl_->reads;
  impl_->read_bytes += bytes;
}

void GpuDirect::write(const std::shared_ptr<const Region>& region, const void* device_memory, std::size_t bytes) {
  check(region, device_memory, bytes);
  // Only read from: both directions have one kind of pointer.
  impl_->transfer(true, *region, static_cast<char*>(const_cast<void*>(device_memory)), bytes);
  ++impl_->writes;
  impl_->written_bytes += bytes;
}

void GpuDirect::check(const std::shared_ptr<const Region>& region, const void* memory, std::size_t bytes) const {
  if (getpid() != impl_->owner) throw Error(Code::state, "cuFile cannot be used in a child of fork()");
  if (region == nullptr || region->storage_ != impl_->storage->impl_) {
    throw Error(Code::invalid_argument, "the region is not one of this Storage");
  }
  if (bytes > region->size()) {
    throw Error(Code::invalid_argument, std::to_string(bytes) + " bytes are more than the region '" + region->name() +
                                            "' of " + std::to_string(region->size()) + " has");
  }
  if (memory == nullptr && bytes > 0) throw Error(Code::invalid_argument, "a transfer needs memory");
}

bool GpuDirect::direct() const {
  return impl_->driver->direct();
}

std::string GpuDirect::describe() const {
  return impl_->driver->describe();
}

GpuDirect::Counters GpuDirect::counters() const {
  const Impl& i = *impl_;
  return {i.reads, i.read_bytes, i.writes, i.written_bytes, i.requests, i.bounced, i.shorts};
}

}  // namespace slidecore
