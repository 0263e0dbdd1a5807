// Storage and its parts: locks, stale files, preallocation, the allocation of regions, and the kernel's structures.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <optional>

#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#define SLIDECORE_HAS_URING_HEADER 1
#endif

#include "io/errors.h"
#include "io/extents.h"
#include "io_support.h"

namespace slidecore {
namespace {

using namespace testing_support;

StorageOptions with(const std::shared_ptr<HookedCalls>& calls, std::size_t stripe = 16384) {
  StorageOptions options;
  options.stripe_bytes = stripe;
  options.calls = calls;
  return options;
}

TEST(Extents, AgreeWithAMapOfUnits) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  io::Extents extents;
  std::vector<bool> taken;  // one flag for each unit that was ever given
  std::map<std::uint64_t, std::uint64_t> held;
  for (int i = 0; i < 3000; ++i) {
    const auto kind = draw(random, 0, 9);
    if (kind == 0 && draw(random, 0, 1) == 0) {
      const auto cut = draw<std::uint64_t>(random, 0, extents.free_at_end(taken.size()));
      extents.cut_end(cut);
      taken.resize(taken.size() - cut);
    } else if (kind == 0) {
      const auto more = draw<std::uint64_t>(random, 0, 50);
      extents.give(taken.size(), more);
      taken.resize(taken.size() + more, false);
    } else if (kind < 6) {
      const auto size = draw<std::uint64_t>(random, 1, 20);
      const auto begin = extents.take(size);
      std::size_t run = 0, longest = 0;
      for (const bool unit : taken) longest = std::max(longest, run = unit ? 0 : run + 1);
      ASSERT_EQ(begin.has_value(), longest >= size);
      if (!begin) continue;
      for (std::uint64_t at = *begin; at < *begin + size; ++at) {
        ASSERT_FALSE(taken.at(at)) << "unit " << at << " was handed out twice";
        taken[at] = true;
      }
      held[*begin] = size;
    } else if (!held.empty()) {
      const auto it =
          std::next(held.begin(), draw<std::ptrdiff_t>(random, 0, static_cast<std::ptrdiff_t>(held.size()) - 1));
      extents.give(it->first, it->second);
      for (std::uint64_t at = it->first; at < it->first + it->second; ++at) taken[at] = false;
      held.erase(it);
    }
    ASSERT_EQ(extents.free_bytes(), static_cast<std::uint64_t>(std::count(taken.begin(), taken.end(), false)));
    std::uint64_t at_end = 0;
    while (at_end < taken.size() && !taken[taken.size() - 1 - at_end]) ++at_end;
    ASSERT_EQ(extents.free_at_end(taken.size()), at_end);
  }
}

TEST(Storage, MakesPreallocatesAndRemovesItsFiles) {
  Directories directories(3);
  const std::size_t open_before = open_files();
  {
    Storage storage(directories.names);
    EXPECT_EQ(storage.files().size(), 3u);
    for (const std::string& file : storage.files()) {
      EXPECT_NE(file.find("slidecore-swap." + std::to_string(getpid()) + ".bin"), std::string::npos);
    }
    storage.reserve(50'000'001);
    EXPECT_GE(storage.reserved_bytes(), 50'000'001u);
    std::uint64_t blocks = 0;
    for (const std::string& file : storage.files()) {
      struct stat status{};
      ASSERT_EQ(stat(file.c_str(), &status), 0);
      EXPECT_GT(static_cast<std::uint64_t>(status.st_size), storage.reserved_bytes() / 3);  // and a block of its own
      EXPECT_EQ(status.st_mode & 0777, 0600u);
      blocks += static_cast<std::uint64_t>(status.st_blocks) * 512;
    }
    EXPECT_GE(blocks, storage.reserved_bytes()) << "the files have holes";
    EXPECT_EQ(directories.files().size(), 6u);  // and their locks
    for (const DirectoryFacts& facts : storage.directories()) {
      EXPECT_EQ(storage.alignment() % facts.offset_alignment, 0u);
      EXPECT_GT(facts.free_bytes, 0u);
      EXPECT_EQ(facts.direct, facts.why_not_direct.empty());
    }
  }
  EXPECT_TRUE(directories.files().empty());
  EXPECT_EQ(open_files(), open_before);
}

TEST(Storage, NamesCanGoBeforeTheFiles) {
  Directories directories(2);
  Storage storage(directories.names);
  storage.remove_files();
  EXPECT_TRUE(directories.files().empty());
  EXPECT_NE(storage.allocate("later", 100), nullptr);  // open files live on
}

TEST(Storage, HandsOutSpaceAndTakesItBack) {
  Directories directories(2);
  Storage storage(directories.names, with(nullptr));
  storage.reserve(1'000'000);
  const std::uint64_t reserved = storage.reserved_bytes();
  for (int round = 0; round < 5; ++round) {
    std::vector<std::shared_ptr<const Region>> regions;
    std::map<std::uint64_t, std::uint64_t> ranges;
    for (std::uint64_t i = 1; i <= 40; ++i) {
      regions.push_back(storage.allocate("region " + std::to_string(i), i * 331));
      EXPECT_EQ(regions.back()->size(), i * 331);
      EXPECT_EQ(regions.back()->base() % storage.alignment(), 0u);
      ranges[regions.back()->base()] = regions.back()->size();
    }
    std::uint64_t end = 0;
    for (const auto& [base, size] : ranges) {
      EXPECT_GE(base, end);
      end = base + size;
    }
    EXPECT_GE(storage.allocated_bytes(), 331u * 40 * 41 / 2);
    EXPECT_EQ(storage.reserved_bytes(), reserved) << "what was given back was not used again";
  }
  EXPECT_EQ(storage.allocated_bytes(), 0u);
  const auto large = storage.allocate("larger than reserved", reserved + 1);
  EXPECT_GT(storage.reserved_bytes(), reserved);
}

TEST(Storage, RefusesWhatCannotBe) {
  Directories directories(2);
  expect_error(Code::invalid_argument, {"at least one directory"}, [] { Storage storage({}); });
  expect_error(Code::invalid_argument, {"/nowhere", "mkdir -p"},
               [&] { Storage storage({directories.names[0], "/nowhere"}); });
  expect_error(Code::invalid_argument, {"given twice"},
               [&] { Storage storage({directories.names[0], directories.names[0] + "/../0"}); });
  std::ofstream(directories.names[1] + "/file") << "text";
  expect_error(Code::invalid_argument, {"file"}, [&] { Storage storage({directories.names[1] + "/file"}); });
  expect_error(Code::invalid_argument, {"stripe_bytes", "4096"},
               [&] { Storage storage({directories.names[0]}, with(nullptr, 5000)); });
  EXPECT_EQ(directories.files().size(), 1u);
  Storage storage({directories.names[0]});
  expect_error(Code::invalid_argument, {"'nothing'"}, [&] { storage.allocate("nothing", 0); });
}

TEST(Storage, IsOneOwnersAlone) {
  Directories directories(2);
  std::optional<Storage> first(std::in_place, std::vector{directories.names[1]});
  expect_error(Code::state, {directories.names[1], std::to_string(getpid()), "in use"},
               [&] { Storage second(directories.names); });
  EXPECT_EQ(directories.files().size(), 2u) << "the second left something behind";
  EXPECT_NO_THROW(first->allocate("still works", 10));
  first.reset();
  EXPECT_NO_THROW(Storage(directories.names));
}

// What another process sees, and what it leaves when it is killed.
TEST(Storage, CleansUpAfterADeadProcess) {
  Directories directories(1);
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    try {
      Storage storage(directories.names);
      storage.reserve(9'000'000);
      if (write(ready[1], "x", 1) != 1) _exit(2);
      for (;;) pause();
    } catch (...) {
      _exit(1);
    }
  }
  char mark = 0;
  close(ready[1]);
  ASSERT_EQ(read(ready[0], &mark, 1), 1) << "the child could not make its Storage";
  close(ready[0]);
  expect_error(Code::state, {"process " + std::to_string(child)}, [&] { Storage storage(directories.names); });
  ASSERT_EQ(kill(child, SIGKILL), 0);
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_EQ(directories.files().size(), 2u);
  // Names that are nearly ours, and what is no file, are somebody else's.
  std::ofstream(directories.names[0] + "/slidecore-swap.12.bin.backup") << "mine";
  std::ofstream(directories.names[0] + "/my-slidecore-swap.12.bin") << "mine";
  std::filesystem::create_directory(directories.names[0] + "/slidecore-swap.13.bin");
  std::filesystem::create_symlink("/dev/null", directories.names[0] + "/slidecore-swap.14.bin");
  {
    Storage storage(directories.names);
    EXPECT_NE(storage.describe().find("removed 1 file"), std::string::npos) << storage.describe();
    EXPECT_FALSE(std::filesystem::exists(directories.names[0] + "/slidecore-swap." + std::to_string(child) + ".bin"));
  }
  EXPECT_EQ(directories.files().size(), 4u);
}

TEST(Storage, AChildOfForkLeavesItAlone) {
  Directories directories(1);
  auto storage = std::make_shared<Storage>(directories.names);
  auto region = storage->allocate("parent's", 10'000);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    region.reset();
    storage.reset();
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(directories.files().size(), 2u);
  EXPECT_THROW(Storage{directories.names}, Error);  // the lock holds
}

TEST(Storage, SaysWhatSpaceIsMissingAndChangesNothing) {
  Directories directories(2);
  Storage storage(directories.names);
  storage.reserve(10'000'000);
  const std::uint64_t reserved = storage.reserved_bytes(), size = std::filesystem::file_size(storage.files()[0]);
  expect_error(Code::io, {directories.names[0], directories.names[1], "needs", " free"},
               [&] { storage.reserve(std::uint64_t{1} << 52); });
  expect_error(Code::io, {"'huge'", "needs"}, [&] { storage.allocate("huge", std::uint64_t{1} << 52); });
  EXPECT_EQ(storage.reserved_bytes(), reserved);
  for (const std::string& file : storage.files()) EXPECT_EQ(std::filesystem::file_size(file), size);
}

// The file system's own answer counts where the arithmetic saw enough: quotas, or another process that was faster.
TEST(Storage, UndoesAPreallocationThatFailsHalfway) {
  Directories directories(2);
  const auto calls = std::make_shared<HookedCalls>();
  Storage storage(directories.names, with(calls));
  const auto kept = storage.allocate("kept", 100'000);
  const std::uint64_t reserved = storage.reserved_bytes(), size = std::filesystem::file_size(storage.files()[0]);
  for (const int code : {ENOSPC, EDQUOT, EIO, EFBIG}) {
    int count = 0;
    calls->set([&](const HookedCalls::Call& call) {
      return is(call, "preallocate") && ++count == 2 ? -code : HookedCalls::kPass;
    });
    expect_error(Code::io, {storage.files()[1], "preallocating", io::errno_text(code)},
                 [&] { storage.reserve(5'000'000); });
    EXPECT_EQ(count, 2);
    EXPECT_EQ(storage.reserved_bytes(), reserved);
    for (const std::string& file : storage.files()) EXPECT_EQ(std::filesystem::file_size(file), size);
  }
  calls->set(nullptr);
  storage.reserve(5'000'000);
  EXPECT_GE(storage.reserved_bytes(), 5'000'000u);
}

// What lies behind the last region goes back to the drives, and can be had again.
TEST(Storage, TrimsTheEndsOfItsFiles) {
  Directories directories(2);
  Storage storage(directories.names, with(nullptr));
  const auto blocks = [&] {
    std::uint64_t bytes = 0;
    for (const std::string& file : storage.files()) {
      struct stat status{};
      EXPECT_EQ(stat(file.c_str(), &status), 0);
      bytes += static_cast<std::uint64_t>(status.st_blocks) * 512;
    }
    return bytes;
  };
  auto first = storage.allocate("first", 3'000'000), last = storage.allocate("last", 1'000'000);
  storage.reserve(8'000'000);
  const std::uint64_t reserved = blocks();
  storage.trim();  // to whole stripes
  EXPECT_LT(storage.reserved_bytes(), 4'000'000u + 3 * 16384);
  EXPECT_LE(blocks(), reserved - 3'900'000);
  first.reset();
  storage.trim();  // the other lies behind it
  EXPECT_GE(storage.reserved_bytes(), 4'000'000u);
  first = storage.allocate("first again", 3'000'000);
  EXPECT_EQ(first->base(), 0u);
  last.reset();
  storage.trim();
  EXPECT_LT(storage.reserved_bytes(), 3'000'000u + 3 * 16384);
  first.reset();
  storage.trim();
  EXPECT_EQ(storage.reserved_bytes(), 0u);
  EXPECT_LT(blocks(), 100'000u);
  const auto whole = storage.allocate("whole", 4'000'000);
  EXPECT_GE(blocks(), 4'000'000u);
}

// Files go by the paths that they were made by, wherever the process has gone since.
TEST(Storage, RelativePathsAreThoseOfItsConstruction) {
  Directories directories(2);
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(directories.names[0]);
  {
    Storage storage({".", "../1"});
    std::filesystem::current_path(before);
    EXPECT_EQ(directories.files().size(), 4u);
    for (const std::string& file : storage.files()) EXPECT_TRUE(std::filesystem::exists(file)) << file;
    EXPECT_TRUE(std::filesystem::path(storage.directories()[1].directory).is_absolute());
  }
  EXPECT_TRUE(directories.files().empty());
}

TEST(Storage, TellsWhereAFileSystemCannotPreallocate) {
  Directories directories(1);
  const auto calls = std::make_shared<HookedCalls>();
  calls->set([](const HookedCalls::Call& call) { return is(call, "preallocate") ? -EOPNOTSUPP : HookedCalls::kPass; });
  Storage storage(directories.names, with(calls));
  storage.reserve(1'000'000);
  EXPECT_GE(std::filesystem::file_size(storage.files()[0]), 1'000'000u);
  EXPECT_NE(storage.describe().find("cannot preallocate"), std::string::npos) << storage.describe();
}

// Every system call of the construction, each failing in turn with each error: an error, and nothing is left.
TEST(Storage, LeavesNothingWhereItsConstructionFails) {
  Directories directories(2);
  const std::size_t open_before = open_files();
  for (const int code : {EIO, ENOSPC, EACCES}) {
    bool made = false;
    int failing = 0;
    for (; !made; ++failing) {
      ASSERT_LT(failing, 1000);
      const auto calls = std::make_shared<HookedCalls>();
      int count = 0;
      std::string failed;
      calls->set([&](const HookedCalls::Call& call) {
        // Failures of these are not noticed: there is nothing to do about them.
        if (is(call, "close") || is(call, "unlink") || count++ != failing) return HookedCalls::kPass;
        failed = call.name;
        return -static_cast<long>(code);
      });
      try {
        Storage storage(directories.names, with(calls));
        calls->set(nullptr);
        made = true;
      } catch (const Error& error) {
        const std::string root = std::filesystem::path(directories.names[0]).parent_path();
        EXPECT_NE(std::string(error.what()).find(root), std::string::npos) << error.what();
      }
      EXPECT_EQ(made, failed.empty()) << failed << " failed and was not noticed";
      // A lock that nobody holds may stay, where it could not be found out whose it is.
      for (const std::string& file : directories.files())
        EXPECT_TRUE(file.ends_with(".lock")) << file << " after " << failed;
      EXPECT_EQ(open_files(), open_before) << "after " << failed;
    }
    EXPECT_GT(failing, 15);
    EXPECT_TRUE(directories.files().empty());
  }
}

TEST(Storage, FallsBackToThePageCacheAndSaysSo) {
  Directories directories(1);
  const DirectoryFacts facts = inspect_directory(directories.names[0]);
  if (!facts.direct) GTEST_SKIP() << "no direct transfers to fall back from: " << facts.why_not_direct;
  const auto calls = std::make_shared<HookedCalls>();
  // The first transfer is refused, as file systems do that accept the flag and mean nothing by it.
  int refused = 0;
  calls->set([&](const HookedCalls::Call& call) {
    return is(call, "pwrite") && call.bytes >= 4096 && refused++ == 0 ? -EINVAL : HookedCalls::kPass;
  });
  Storage storage(directories.names, with(calls));
  EXPECT_FALSE(storage.directories()[0].direct);
  EXPECT_FALSE(storage.directories()[0].why_not_direct.empty());
  EXPECT_NE(storage.describe().find("page cache"), std::string::npos) << storage.describe();
}

TEST(InspectDirectory, SaysWhatThereIsAndLeavesNothing) {
  Directories directories(1);
  const DirectoryFacts facts = inspect_directory(directories.names[0]);
  EXPECT_EQ(facts.directory, directories.names[0]);
  EXPECT_FALSE(facts.filesystem.empty());
  EXPECT_GT(facts.total_bytes, 0u);
  EXPECT_TRUE(directories.files().empty());
  expect_error(Code::invalid_argument, {"/nowhere"}, [] { inspect_directory("/nowhere"); });
  if (std::filesystem::is_directory("/dev/shm")) {
    EXPECT_TRUE(inspect_directory("/dev/shm").in_memory);
  }
}

#ifdef SLIDECORE_HAS_URING_HEADER
// The kernel's own header as the reference, where there is one.
TEST(UringAbi, IsTheKernels) {
  using namespace io::abi;
  EXPECT_EQ(sizeof(Sqe), sizeof(io_uring_sqe));
  EXPECT_EQ(offsetof(Sqe, offset), offsetof(io_uring_sqe, off));
  EXPECT_EQ(offsetof(Sqe, address), offsetof(io_uring_sqe, addr));
  EXPECT_EQ(offsetof(Sqe, length), offsetof(io_uring_sqe, len));
  EXPECT_EQ(offsetof(Sqe, op_flags), offsetof(io_uring_sqe, rw_flags));
  EXPECT_EQ(offsetof(Sqe, op_flags), offsetof(io_uring_sqe, poll_events));
  EXPECT_EQ(offsetof(Sqe, user_data), offsetof(io_uring_sqe, user_data));
  EXPECT_EQ(offsetof(Sqe, buffer_index), offsetof(io_uring_sqe, buf_index));
  EXPECT_EQ(sizeof(Cqe), sizeof(io_uring_cqe));
  EXPECT_EQ(offsetof(Cqe, result), offsetof(io_uring_cqe, res));
  EXPECT_EQ(sizeof(Params), sizeof(io_uring_params));
  EXPECT_EQ(offsetof(Params, features), offsetof(io_uring_params, features));
  EXPECT_EQ(offsetof(Params, sq), offsetof(io_uring_params, sq_off));
  EXPECT_EQ(offsetof(Params, cq), offsetof(io_uring_params, cq_off));
  EXPECT_EQ(offsetof(SubmissionOffsets, array), offsetof(io_sqring_offsets, array));
  EXPECT_EQ(offsetof(CompletionOffsets, cqes), offsetof(io_cqring_offsets, cqes));
  EXPECT_EQ(kRead, IORING_OP_READ);
  EXPECT_EQ(kWrite, IORING_OP_WRITE);
  EXPECT_EQ(kReadFixed, IORING_OP_READ_FIXED);
  EXPECT_EQ(kWriteFixed, IORING_OP_WRITE_FIXED);
  EXPECT_EQ(kPollAdd, IORING_OP_POLL_ADD);
  EXPECT_EQ(kTimeout, IORING_OP_TIMEOUT);
  EXPECT_EQ(kGetEvents, IORING_ENTER_GETEVENTS);
  EXPECT_EQ(kFixedFile, IOSQE_FIXED_FILE);
  EXPECT_EQ(kOffsetSqes, IORING_OFF_SQES);
  EXPECT_EQ(kRegisterProbe, static_cast<unsigned>(IORING_REGISTER_PROBE));
  EXPECT_EQ(kUnregisterFiles, static_cast<unsigned>(IORING_UNREGISTER_FILES));
#ifdef IORING_SETUP_DEFER_TASKRUN  // headers of Linux 6.1 or newer
  EXPECT_EQ(kSingleIssuer, IORING_SETUP_SINGLE_ISSUER);
  EXPECT_EQ(kDeferTaskrun, IORING_SETUP_DEFER_TASKRUN);
  EXPECT_EQ(kCoopTaskrun, IORING_SETUP_COOP_TASKRUN);
  EXPECT_EQ(kSparse, IORING_RSRC_REGISTER_SPARSE);
  EXPECT_EQ(sizeof(ResourceRegister), sizeof(io_uring_rsrc_register));
  EXPECT_EQ(sizeof(ResourceUpdate), sizeof(io_uring_rsrc_update2));
  EXPECT_EQ(offsetof(ResourceUpdate, count), offsetof(io_uring_rsrc_update2, nr));
  EXPECT_EQ(kRegisterBuffers2, static_cast<unsigned>(IORING_REGISTER_BUFFERS2));
  EXPECT_EQ(kUpdateBuffers, static_cast<unsigned>(IORING_REGISTER_BUFFERS_UPDATE));
#endif
}
#endif

}  // namespace
}  // namespace slidecore
