#pragma once
// The disk tier: swap files striped over directories (drives), and asynchronous direct transfers to and from them.
//
//   auto storage = std::make_shared<Storage>(directories);  // locks the directories, cleans up after dead owners
//   storage->reserve(bytes);                                // preallocates, or says what is short, before work starts
//   auto region = storage->allocate("layers.0.exp_avg", bytes);
//   Transfers transfers(storage);
//   Ticket written = transfers.write(region, 0, memory, bytes);
//   transfers.wait(written);
//
// Swap files are not checkpoints: nothing is synced to the medium, and the files go with their Storage.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace slidecore {

namespace io {
class SystemCalls;
}

// Names one asynchronous transfer. 0 is a transfer that is already done.
using Ticket = std::uint64_t;

// What a directory's file system said when it was asked.
struct DirectoryFacts {
  std::string directory;
  std::string filesystem;            // "ext4", "xfs", "tmpfs", ...; a number in hexadecimal where unknown
  bool in_memory = false;            // tmpfs or ramfs: no drive, whatever it is called
  bool direct = false;               // transfers bypass the page cache
  std::string why_not_direct;        // empty if they do
  bool alignment_reported = false;   // by statx; else assumed
  std::size_t memory_alignment = 1;  // of addresses, in bytes
  std::size_t offset_alignment = 1;  // of file offsets and lengths, in bytes
  std::uint64_t free_bytes = 0;      // what this user may still allocate
  std::uint64_t total_bytes = 0;
  std::uint32_t device_major = 0, device_minor = 0;  // of the file system, as in /sys/dev/block/MAJOR:MINOR
};

// Makes a file in the directory, asks, and removes it. Throws Error(invalid_argument) if it is no directory, Error(io)
// if a file cannot be made there.
DirectoryFacts inspect_directory(const std::string& directory);

struct StorageOptions {
  // Neighbouring bytes lie on one drive up to this many, then the next drive takes over. A multiple of 4096 and of
  // every drive's offset alignment.
  std::size_t stripe_bytes = std::size_t{4} << 20;
  std::shared_ptr<io::SystemCalls> calls = nullptr;  // for tests; null: the kernel's
};

class Region;

// One swap file in each directory, "slidecore-swap.PID.bin", guarded by "slidecore-swap.lock". Both are removed by
// the destructor (or remove_files()); a process that dies leaves them to the next Storage in the directory, which
// removes them. Thread-safe after construction. A child of fork() must not use it, and leaves the files alone. Paths
// that are relative are so to the directory that the process is in during construction.
class Storage {
 public:
  // Throws Error(invalid_argument) for no directories, one given twice, or one that does not exist; Error(state), with
  // the owner's process id, for one that another Storage (of any process) holds; Error(io) if one cannot be written.
  explicit Storage(const std::vector<std::string>& directories, const StorageOptions& options = {});
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  // Preallocates until regions of `bytes` in total fit (those that exist counted in; each takes a multiple of
  // alignment()). Throws Error(io) with what is needed and what is free in each directory; then nothing has changed.
  void reserve(std::uint64_t bytes);

  // Gives the drives back what lies behind the last region, also where reserve() has preallocated it.
  void trim();

  // A region of `bytes` (at least 1) whose content is undefined until written. Grows the files where reserve() has not.
  // The space returns when the last pointer to the region, and the last transfer that uses it, is gone. Regions keep
  // the files open, but not their names: they must not be used after the Storage is gone.
  std::shared_ptr<const Region> allocate(const std::string& name, std::uint64_t bytes);

  // Unlinks the files' names now; open files stay usable. For exits that run no destructors.
  void remove_files() noexcept;

  std::uint64_t reserved_bytes() const;                    // preallocated in all files
  std::uint64_t allocated_bytes() const;                   // of all regions, with their padding
  std::size_t alignment() const;                           // offsets and sizes that are multiples of it need no copy
  std::size_t memory_alignment() const;                    // likewise of addresses
  const std::vector<DirectoryFacts>& directories() const;  // as they were at construction, with absolute paths
  const std::vector<std::string>& files() const;           // one absolute path for each directory
  // Sentences: drives, direct or not and why, alignment, what was cleaned up.
  std::string describe() const;

  struct Impl;

 private:
  friend class Region;
  friend class GpuDirect;
  friend class Transfers;
  std::shared_ptr<Impl> impl_;
};

// A named range of a Storage, `size()` bytes as asked for; padded to the alignment on the drives.
class Region {
 public:
  Region(std::shared_ptr<Storage::Impl> storage, std::string name, std::uint64_t base, std::uint64_t size);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  const std::string& name() const { return name_; }
  std::uint64_t size() const { return size_; }
  std::uint64_t base() const { return base_; }  // in the striped space of the whole Storage

 private:
  friend class GpuDirect;
  friend class Transfers;
  std::shared_ptr<Storage::Impl> storage_;
  std::string name_;
  std::uint64_t base_, size_;
};

struct TransferOptions {
  // "uring", "threads", or "" for SLIDECORE_IO if that is set, else io_uring where the kernel allows it.
  std::string backend;
  std::size_t block_bytes = std::size_t{1} << 20;  // the most that one request moves; a multiple of alignment()
  std::size_t queue_depth = 0;                     // requests in flight per drive; 0: 16 (uring) or 8 (threads)
  double patience_s = 30;                          // how long EAGAIN and transfers without progress are retried
};

struct TransferSpan {
  bool write;
  std::size_t bytes;
  std::chrono::steady_clock::time_point start, end;  // from the first request until all of it was done
};

// Asynchronous reads and writes. Neither order nor atomicity between tickets: a transfer that must see another's effect
// is started after that ticket is done. Transfers in flight may not overlap in bytes, in the region or in memory,
// unless all of them read. Any offset, size and address will do; what is not aligned costs a copy, and at the ends
// of a write a read of the block around it.
//
// Every result is checked: short transfers continue, EINTR and EAGAIN are retried. Any other failure stops all
// transfers and is thrown by the next call, and by every later one, with file, offset, size and reason. When it is
// thrown nothing is in flight any more: memory may be freed. What was being written then is undefined. A file that was
// truncated is such a failure of the next transfer, wherever that reads or writes; holes punched into a file are not
// found.
//
// All methods are thread-safe. Neither they nor the destructor may be called in a child of fork() (the destructor does
// nothing there).
class Transfers {
 public:
  // Throws Error(invalid_argument) for options that cannot be, Error(unsupported) with the reason if a backend is
  // forced that this machine does not allow.
  explicit Transfers(std::shared_ptr<Storage> storage, const TransferOptions& options = {});
  // Drops what has not begun, waits for what the drives are working on, and joins every thread.
  ~Transfers();
  Transfers(const Transfers&) = delete;
  Transfers& operator=(const Transfers&) = delete;

  // Memory must stay as it is until the ticket is done. Throws Error(invalid_argument) for a range outside the region,
  // and for a region of another Storage.
  Ticket read(const std::shared_ptr<const Region>& region, std::uint64_t offset, void* memory, std::size_t bytes);
  Ticket write(const std::shared_ptr<const Region>& region, std::uint64_t offset, const void* memory,
               std::size_t bytes);

  bool done(Ticket ticket);  // throws Error(invalid_argument) for a ticket that was never given
  void wait(Ticket ticket);  // blocks
  void synchronize();        // until every transfer that was started before is done
  void check();              // throws the stored error, if any

  // Spares the kernel the pinning of pages for each request to this memory. Returns whether it did: never in the
  // threads backend, and not where the kernel or the memory lock limit forbids it; describe() says why. Transfers work
  // all the same. Unregister before unmapping: registered pages stay in memory.
  bool register_memory(void* memory, std::size_t bytes);
  void unregister_memory(void* memory);

  // `observer` hears of each transfer that is done, on a thread of the backend; it must be quick, not throw, and not
  // call this object. None hears anything once this returns. Null: nobody.
  void observe(std::function<void(const TransferSpan&)> observer);

  const char* backend() const;  // "uring" or "threads"
  std::size_t block_bytes() const;
  std::size_t queue_depth() const;
  std::string describe() const;  // which backend, why, and with which of the kernel's features

  struct Counters {
    std::uint64_t reads, read_bytes, writes, written_bytes;  // of tickets that are done, as asked for
    std::uint64_t requests;                                  // given to the kernel
    std::uint64_t bounced_bytes;                             // copied because something was not aligned
    std::uint64_t short_transfers;                           // continued
    std::uint64_t retries;                                   // after EINTR or EAGAIN
  };
  Counters counters() const;

  struct Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

// Why io_uring cannot be used here; empty if it can.
std::string why_no_io_uring();

}  // namespace slidecore
