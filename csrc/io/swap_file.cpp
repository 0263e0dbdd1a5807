#include "io/swap_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <utility>

#include "io/errors.h"
#include "slidecore/status.h"

namespace slidecore::io {
namespace {

constexpr std::string_view kPrefix = "slidecore-swap.", kSuffix = ".bin";

using Block = std::unique_ptr<char, decltype(&std::free)>;

Block aligned_block(std::size_t bytes) {
  Block block(static_cast<char*>(std::aligned_alloc(std::max(bytes, kAssumedAlignment), bytes)), &std::free);
  if (block == nullptr) throw Error(Code::out_of_memory, "no memory for a block of " + size_text(bytes));
  return block;
}

// "slidecore-swap.1234.bin"
bool is_ours(std::string_view name) {
  if (!name.starts_with(kPrefix) || !name.ends_with(kSuffix)) return false;
  if (name.size() <= kPrefix.size() + kSuffix.size()) return false;
  const std::string_view number = name.substr(kPrefix.size(), name.size() - kPrefix.size() - kSuffix.size());
  return number.find_first_not_of("0123456789") == std::string_view::npos;
}

// Transfers all of it; returns 0 or -errno. An end of file counts as EIO.
template <class Call>
long whole(std::size_t bytes, const Call& call) {
  for (std::size_t at = 0; at < bytes;) {
    const long done = call(at);
    if (done == -EINTR || done == -EAGAIN) continue;
    if (done <= 0) return done == 0 ? -EIO : done;
    at += static_cast<std::size_t>(done);
  }
  return 0;
}

}  // namespace

SwapFile::SwapFile(std::shared_ptr<SystemCalls> calls, const std::string& directory)
    : calls_(std::move(calls)),
      path_(directory + "/" + std::string(kPrefix) + std::to_string(getpid()) + std::string(kSuffix)) {
  facts_.directory = directory;
  remove_stale(directory);
  fd_ = open_direct(*calls_, path_, facts_);
  named_ = true;
  try {
    try_out();
  } catch (...) {
    remove_name();
    calls_->close(fd_);
    throw;
  }
}

SwapFile::~SwapFile() {
  remove_name();
  calls_->close(fd_);
}

void SwapFile::remove_stale(const std::string& directory) {
  std::error_code error;
  for (std::filesystem::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    std::error_code ignored;
    if (!is_ours(it->path().filename().string())) continue;
    if (!std::filesystem::is_regular_file(it->symlink_status(ignored))) continue;
    const std::uint64_t bytes = it->file_size(ignored);
    if (const int code = calls_->unlink(it->path().c_str()); code < 0) {
      throw Error(Code::io,
                  "removing " + it->path().string() + ", which a dead process left, failed: " + errno_text(code));
    }
    ++removed_files_;
    removed_bytes_ += ignored ? 0 : bytes;
  }
  if (error) throw Error(Code::io, "listing " + directory + " failed: " + error.message());
}

// Some file systems accept O_DIRECT and refuse the first transfer.
void SwapFile::try_out() {
  const std::size_t bytes = std::max(facts_.offset_alignment, kAssumedAlignment);
  grow(bytes);
  const Block written = aligned_block(bytes), read = aligned_block(bytes);
  for (std::size_t i = 0; i < bytes; ++i) written.get()[i] = static_cast<char>(i * 7 + 1);
  std::memset(read.get(), 0, bytes);
  const auto transfer = [&] {
    const long code =
        whole(bytes, [&](std::size_t at) { return calls_->pwrite(fd_, written.get() + at, bytes - at, at); });
    if (code < 0) return code;
    return whole(bytes, [&](std::size_t at) { return calls_->pread(fd_, read.get() + at, bytes - at, at); });
  };
  long code = transfer();
  if (code == -EINVAL && facts_.direct) {
    reopen_buffered("the first direct transfer: " + errno_text(code));
    code = transfer();
  }
  if (code < 0) {
    throw Error(Code::io, "trying out " + path_ + " with " + std::to_string(bytes) +
                              " bytes at offset 0 failed: " + errno_text(code));
  }
  if (std::memcmp(written.get(), read.get(), bytes) != 0) {
    throw Error(Code::io,
                "trying out " + path_ + ": what was read back is not what was written. Do not use this drive");
  }
}

void SwapFile::reopen_buffered(const std::string& why) {
  const int fd = calls_->open(path_.c_str(), O_RDWR | O_CLOEXEC, 0);
  if (fd < 0) throw Error(Code::io, "opening " + path_ + " without O_DIRECT failed: " + errno_text(fd));
  calls_->close(std::exchange(fd_, fd));
  facts_.direct = facts_.alignment_reported = false;
  facts_.memory_alignment = 1;
  facts_.offset_alignment = kAssumedAlignment;
  facts_.why_not_direct = why;
}

std::uint64_t SwapFile::free_bytes() const {
  FileStatus status{};
  if (const int code = calls_->status(fd_, &status); code < 0) {
    throw Error(Code::io, "asking the file system about " + path_ + " failed: " + errno_text(code));
  }
  return status.free_bytes;
}

std::uint64_t SwapFile::guard() const {
  return std::max(facts_.offset_alignment, kAssumedAlignment);
}

std::string SwapFile::why_not_whole() const {
  // Shorter than before and after: a file that grows or shrinks meanwhile is whole.
  const std::uint64_t before = length_;
  const std::int64_t size = calls_->size(fd_);
  const std::uint64_t length = std::min<std::uint64_t>(before, length_);
  if (size < 0) return "asking how long " + path_ + " is failed: " + errno_text(size);
  if (static_cast<std::uint64_t>(size) >= length) return "";
  return "at offset " + std::to_string(size) + " of " + path_ + " the file ends, " +
         std::to_string(length - static_cast<std::uint64_t>(size)) +
         " bytes too early: something has truncated it, and what was there is lost. Go on from the last checkpoint";
}

void SwapFile::grow(std::uint64_t bytes) {
  if (bytes <= size_) return;
  // Making a truncated file longer would hide that it was.
  if (const std::string why = why_not_whole(); !why.empty()) throw Error(Code::io, why);
  const std::uint64_t length = length_, wanted = bytes + guard();
  int code = -EINTR;
  while (code == -EINTR) code = calls_->preallocate(fd_, length, wanted - length);
  if (code == -EOPNOTSUPP || code == -ENOSYS) {
    preallocated_ = false;
    code = calls_->truncate(fd_, wanted);
  }
  if (code < 0) {
    calls_->truncate(fd_, length);  // a part may have been allocated
    throw Error(Code::io, "preallocating " + size_text(wanted) + " for " + path_ + " failed: " + errno_text(code));
  }
  length_ = wanted;
  size_ = bytes;
}

void SwapFile::shrink(std::uint64_t bytes) noexcept {
  if (bytes >= size_) return;
  try {
    if (!why_not_whole().empty()) return;  // whoever uses it next is told
  } catch (...) {
    return;  // no memory for words: it stays as long as it is
  }
  size_ = bytes;
  length_ = bytes + guard();  // before the file: it is never too short
  calls_->truncate(fd_, bytes + guard());
}

void SwapFile::remove_name() noexcept {
  if (!named_) return;
  named_ = false;
  calls_->unlink(path_.c_str());
}

}  // namespace slidecore::io
