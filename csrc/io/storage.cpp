#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <utility>

#include "io/errors.h"
#include "io/storage_impl.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

// The files are made and removed by their paths, and the process may go elsewhere between the two.
std::vector<std::string> absolute(const std::vector<std::string>& directories) {
  std::vector<std::string> paths;
  for (const std::string& directory : directories) {
    std::error_code error;
    const auto path = std::filesystem::absolute(directory, error);
    paths.push_back(error || directory.empty() ? directory : path.string());
  }
  return paths;
}

void check_directories(io::SystemCalls& calls, const std::vector<std::string>& directories) {
  if (directories.empty()) throw Error(Code::invalid_argument, "a Storage needs at least one directory");
  std::set<std::pair<std::uint64_t, std::uint64_t>> seen;
  for (const std::string& directory : directories) {
    const int fd = calls.open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (fd < 0) {
      throw Error(Code::invalid_argument, "the swap directory " + directory + " cannot be used: " + io::errno_text(fd) +
                                              ". Make it first (mkdir -p), on the drive to use");
    }
    io::FileStatus status{};
    const int code = calls.status(fd, &status);
    calls.close(fd);
    if (code < 0) {
      throw Error(Code::io, "asking the file system about " + directory + " failed: " + io::errno_text(code));
    }
    const std::uint64_t device = std::uint64_t{status.device_major} << 32 | status.device_minor;
    if (!seen.emplace(device, status.inode).second) {
      throw Error(Code::invalid_argument, "the swap directory " + directory + " is given twice");
    }
  }
}

}  // namespace

Storage::Impl::Impl(const std::vector<std::string>& given, const StorageOptions& options)
    : calls(options.calls ? options.calls : std::make_shared<io::SystemCalls>()),
      stripe(options.stripe_bytes),
      owner(getpid()) {
  const std::vector<std::string> directories = absolute(given);
  check_directories(*calls, directories);
  if (stripe == 0 || stripe % unit != 0) {
    throw Error(Code::invalid_argument,
                "stripe_bytes must be a multiple of " + std::to_string(unit) + ", not " + std::to_string(stripe));
  }
  // All locks before the first file, so that a directory in use is told before anything is made or removed.
  for (const std::string& directory : directories) {
    locks.push_back(std::make_unique<io::DirectoryLock>(calls, directory));
  }
  for (const std::string& directory : directories) {
    files.push_back(std::make_unique<io::SwapFile>(calls, directory));
    facts.push_back(files.back()->facts());
    paths.push_back(files.back()->path());
    unit = std::max(unit, facts.back().offset_alignment);
    memory_alignment = std::max(memory_alignment, facts.back().memory_alignment);
  }
  if (stripe % unit != 0) {
    throw Error(Code::invalid_argument, "stripe_bytes=" + std::to_string(stripe) + " must be a multiple of " +
                                            std::to_string(unit) + ", which these drives need");
  }
}

Storage::Impl::~Impl() {
  if (!in_child()) return;
  for (auto& file : files) static_cast<void>(file.release());
  for (auto& lock : locks) static_cast<void>(lock.release());
}

bool Storage::Impl::in_child() const {
  return getpid() != owner;
}

void Storage::Impl::remove_files() noexcept {
  if (in_child()) return;
  for (auto& file : files) file->remove_name();
  for (auto& lock : locks) lock->remove_name();
}

Storage::Impl::Place Storage::Impl::place(std::uint64_t at) const {
  const std::uint64_t drives = files.size();
  if (drives == 1) return {0, at, UINT64_MAX - at};
  const std::uint64_t number = at / stripe, within = at % stripe;
  return {static_cast<std::uint32_t>(number % drives), number / drives * stripe + within, stripe - within};
}

// Directories of one file system share its space.
void Storage::Impl::check_space(std::uint64_t file_bytes) const {
  struct Need {
    std::uint64_t bytes = 0, free = 0;
    std::string names;
  };
  std::map<std::pair<std::uint32_t, std::uint32_t>, Need> needs;
  for (std::size_t i = 0; i < files.size(); ++i) {
    Need& need = needs[{facts[i].device_major, facts[i].device_minor}];
    need.bytes += file_bytes - std::min(file_bytes, files[i]->size());
    need.free = files[i]->free_bytes();
    need.names += (need.names.empty() ? "" : ", ") + facts[i].directory;
  }
  bool short_of = false;
  std::string text = "not enough space for swap files:";
  for (const auto& [device, need] : needs) {
    short_of = short_of || need.bytes > need.free;
    text += " " + need.names + " needs " + io::size_text(need.bytes) + " more and has " + io::size_text(need.free) +
            " free;";
  }
  if (short_of) throw Error(Code::io, text + " free space there, give other or more directories, or offload less");
}

void Storage::Impl::check_files(bool write, const Region& region) const {
  for (const auto& file : files) {
    const std::string why = file->why_not_whole();
    if (why.empty()) continue;
    throw Error(Code::io, std::string(write ? "writing" : "reading") + " '" + region.name() + "' failed: " + why);
  }
}

void Storage::Impl::grow(std::uint64_t wanted) {
  if (wanted <= capacity) return;
  const std::uint64_t row = stripe * files.size();
  if (wanted > UINT64_MAX / 2 - row) throw Error(Code::invalid_argument, "swap files of that size cannot be");
  const std::uint64_t rows = (wanted + row - 1) / row;
  check_space(rows * stripe);
  std::vector<std::uint64_t> before;
  for (const auto& file : files) before.push_back(file->size());
  try {
    for (auto& file : files) file->grow(rows * stripe);
  } catch (...) {
    for (std::size_t i = 0; i < files.size(); ++i) {
      if (files[i]->size() > before[i]) files[i]->shrink(before[i]);
    }
    throw;
  }
  space.give(capacity, rows * row - capacity);
  capacity = rows * row;
}

void Storage::Impl::trim() {
  if (in_child()) return;
  const std::lock_guard lock(mutex);
  const std::uint64_t row = stripe * files.size();
  const std::uint64_t used = capacity - space.free_at_end(capacity);
  const std::uint64_t rows = (used + row - 1) / row;
  space.cut_end(capacity - rows * row);
  capacity = rows * row;
  for (auto& file : files) file->shrink(rows * stripe);
}

std::uint64_t Storage::Impl::take(std::uint64_t bytes, const std::string& name) {
  if (bytes == 0 || bytes > UINT64_MAX / 4) {
    throw Error(Code::invalid_argument, "the region '" + name + "' cannot have " + std::to_string(bytes) + " bytes");
  }
  const std::uint64_t size = padded(bytes);
  const std::lock_guard lock(mutex);
  auto base = space.take(size);
  if (!base) {
    try {
      grow(capacity + size - space.free_at_end(capacity));
    } catch (const Error& error) {
      throw Error(error.code(), "making the region '" + name + "' of " + io::size_text(bytes) + ": " + error.what());
    }
    base = space.take(size);
  }
  allocated += size;
  return *base;
}

void Storage::Impl::give(std::uint64_t base, std::uint64_t bytes) {
  if (in_child()) return;
  const std::lock_guard lock(mutex);
  space.give(base, padded(bytes));
  allocated -= padded(bytes);
}

std::string Storage::Impl::describe() const {
  std::string text;
  std::set<std::pair<std::uint32_t, std::uint32_t>> drives;
  for (std::size_t i = 0; i < files.size(); ++i) {
    const DirectoryFacts& fact = facts[i];
    drives.emplace(fact.device_major, fact.device_minor);
    text += fact.directory + " (" + fact.filesystem + "): ";
    text += fact.direct ? "direct transfers" : "through the page cache (" + fact.why_not_direct + ")";
    text += ", offsets in multiples of " + std::to_string(fact.offset_alignment) + ", addresses of " +
            std::to_string(fact.memory_alignment) + (fact.alignment_reported || !fact.direct ? "" : " (assumed)");
    if (fact.in_memory) text += "; this is memory, not a drive";
    if (!files[i]->preallocated()) text += "; the file system cannot preallocate, so space may still run out";
    if (files[i]->removed_files() > 0) {
      text += "; removed " + std::to_string(files[i]->removed_files()) + " file(s), " +
              io::size_text(files[i]->removed_bytes()) + ", that a dead process left";
    }
    text += ". ";
  }
  if (drives.size() < files.size()) {
    text += std::to_string(files.size()) + " directories lie on " + std::to_string(drives.size()) + " file system(s). ";
  }
  text.pop_back();
  return text;
}

Storage::Storage(const std::vector<std::string>& directories, const StorageOptions& options)
    : impl_(std::make_shared<Impl>(directories, options)) {}

Storage::~Storage() {
  impl_->remove_files();
}

void Storage::reserve(std::uint64_t bytes) {
  const std::lock_guard lock(impl_->mutex);
  impl_->grow(bytes);
}

void Storage::trim() {
  impl_->trim();
}

std::shared_ptr<const Region> Storage::allocate(const std::string& name, std::uint64_t bytes) {
  const std::uint64_t base = impl_->take(bytes, name);
  try {
    return std::make_shared<const Region>(impl_, name, base, bytes);
  } catch (...) {
    impl_->give(base, bytes);
    throw;
  }
}

void Storage::remove_files() noexcept {
  impl_->remove_files();
}

std::uint64_t Storage::reserved_bytes() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->capacity;
}
std::uint64_t Storage::allocated_bytes() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->allocated;
}
std::size_t Storage::alignment() const {
  return impl_->unit;
}
std::size_t Storage::memory_alignment() const {
  return impl_->memory_alignment;
}
const std::vector<DirectoryFacts>& Storage::directories() const {
  return impl_->facts;
}
const std::vector<std::string>& Storage::files() const {
  return impl_->paths;
}
std::string Storage::describe() const {
  return impl_->describe();
}

Region::Region(std::shared_ptr<Storage::Impl> storage, std::string name, std::uint64_t base, std::uint64_t size)
    : storage_(std::move(storage)), name_(std::move(name)), base_(base), size_(size) {}

Region::~Region() {
  storage_->give(base_, size_);
}

}  // namespace slidecore
