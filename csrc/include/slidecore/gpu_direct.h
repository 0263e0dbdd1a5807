#pragma once
// Transfers between swap files and device memory through NVIDIA's cuFile (GPUDirect Storage), without a copy in host
// memory where the machine allows that. The library is loaded when it is asked for, never before.
//
//   GpuDirect direct(device, storage);   // throws if there is no cuFile, or it cannot be used here
//   direct.write(region, device_memory, bytes);
//   direct.read(region, device_memory, bytes);

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "slidecore/device.h"
#include "slidecore/io.h"

namespace slidecore {

struct CuFileFacts {
  std::string library;  // its path
  std::string version;  // empty if it does not say
};

// Loads cuFile without opening its driver; it stays loaded. `paths` are tried after SLIDECORE_CUFILE_LIBRARY, or
// without that after what is mapped and what the loader finds. Throws Error(unsupported) naming every attempt.
CuFileFacts inspect_cufile(const std::vector<std::string>& paths = {});

// Blocking; any thread may call, also several at once for ranges that do not overlap. Drives that a range is striped
// over work at the same time. cuFile moves whole blocks (Storage::alignment()); what is left at the end, less than one,
// passes through host memory, as not every release and file system takes sizes that are not aligned.
//
// Every result is checked: short transfers continue, and failures are an Error(io) with file, offset, size and cuFile's
// code. In a child of fork() it must not be used, and its destructor does nothing.
class GpuDirect {
 public:
  // Opens cuFile's driver and registers the storage's files. Throws Error(unsupported) if cuFile is not found, cannot
  // be used here, or a directory does not take direct transfers.
  GpuDirect(std::shared_ptr<Device> device, std::shared_ptr<Storage> storage,
            const std::vector<std::string>& paths = {});
  ~GpuDirect();
  GpuDirect(const GpuDirect&) = delete;
  GpuDirect& operator=(const GpuDirect&) = delete;

  // The first `bytes` of the region. All work that uses the device memory must be done, and it must stay as it is.
  // Throws Error(invalid_argument) for a region of another Storage, or one that is too small.
  void read(const std::shared_ptr<const Region>& region, void* device_memory, std::size_t bytes);
  // What the region's last block has behind `bytes` is undefined then.
  void write(const std::shared_ptr<const Region>& region, const void* device_memory, std::size_t bytes);

  bool direct() const;           // false: cuFile itself copies through host memory (its compatibility mode)
  std::string describe() const;  // which library, and which way bytes go

  struct Counters {
    std::uint64_t reads, read_bytes, writes, written_bytes;  // that are done, as asked for
    std::uint64_t requests;                                  // given to cuFile
    std::uint64_t bounced_bytes;                             // of ends of less than a block
    std::uint64_t short_transfers;                           // continued
  };
  Counters counters() const;

 private:
  void check(const std::shared_ptr<const Region>& region, const void* memory, std::size_t bytes) const;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace slidecore
