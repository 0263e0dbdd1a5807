// HostBuffer and Ring on the host backend, and the parts they are made of.

#include "slidecore/memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "memory/mapping.h"
#include "memory/numa.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

std::shared_ptr<Device> host() {
  return std::make_shared<Device>("host", 0);
}

std::size_t page_size() {
  return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

std::size_t to_pages(std::size_t bytes) {
  return (bytes + page_size() - 1) / page_size() * page_size();
}

bool is_mapped(void* data, std::size_t bytes) {
  std::vector<unsigned char> pages(to_pages(bytes) / page_size());
  return mincore(data, bytes, pages.data()) == 0;
}

bool is_present(void* data, std::size_t bytes) {
  std::vector<unsigned char> pages(to_pages(bytes) / page_size());
  if (mincore(data, bytes, pages.data()) != 0) return false;
  return std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
}

TEST(HostBuffer, IsZeroedPresentAndWritableAtAnySize) {
  const auto device = host();
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{4096}, std::size_t{4097}, std::size_t{2'097'152},
                                  std::size_t{2'097'153}, std::size_t{135'000'011}}) {
    HostBuffer buffer(device, bytes, bytes % 2 == 0);
    ASSERT_NE(buffer.data(), nullptr);
    EXPECT_EQ(buffer.size(), bytes);
    EXPECT_FALSE(buffer.pinned());  // the host device needs no pinning
    EXPECT_TRUE(is_present(buffer.data(), bytes)) << bytes << " bytes";
    const auto* data = static_cast<const unsigned char*>(buffer.data());
    EXPECT_EQ(std::count(data, data + bytes, 0), static_cast<std::ptrdiff_t>(bytes));
    std::memset(buffer.data(), 0xa5, bytes);
    EXPECT_EQ(data[bytes - 1], 0xa5);
    if (bytes >= 2'097'152) {
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 2'097'152, 0u);
    }
  }
}

TEST(HostBuffer, OfNothingIsNothing) {
  const std::uint64_t mapped = HostBuffer::mapped_now();
  HostBuffer buffer(host(), 0, true);
  EXPECT_EQ(buffer.data(), nullptr);
  EXPECT_EQ(buffer.size(), 0u);
  EXPECT_FALSE(buffer.pinned());
  EXPECT_EQ(HostBuffer::mapped_now(), mapped);
}

TEST(HostBuffer, IsAccountedAndUnmapped) {
  const auto device = host();
  const std::uint64_t before = HostBuffer::mapped_now();
  void* data = nullptr;
  {
    HostBuffer first(device, 100'003, false), second(device, 7'000'001, false);
    const std::uint64_t both = to_pages(100'003) + to_pages(7'000'001);
    EXPECT_EQ(HostBuffer::mapped_now(), before + both);
    EXPECT_GE(HostBuffer::mapped_peak(), before + both);
    data = second.data();
    EXPECT_TRUE(is_mapped(data, second.size()));
  }
  EXPECT_FALSE(is_mapped(data, 7'000'001));
  EXPECT_EQ(HostBuffer::mapped_now(), before);
}

TEST(HostBuffer, TooMuchIsAnErrorWithNumbers) {
  const std::uint64_t before = HostBuffer::mapped_now();
  for (const std::size_t bytes : {std::size_t{1} << 55, SIZE_MAX}) {
    try {
      HostBuffer buffer(host(), bytes, false);
      FAIL() << "mapped " << bytes << " bytes";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::out_of_memory);
      const std::string text = error.what();
      EXPECT_NE(text.find(std::to_string(bytes)), std::string::npos) << text;
      EXPECT_NE(text.find("MemAvailable"), std::string::npos) << text;
    }
  }
  EXPECT_EQ(HostBuffer::mapped_now(), before);
}

TEST(HostBuffer, NeedsADevice) {
  EXPECT_THROW(HostBuffer(nullptr, 1, false), Error);
}

// A child may only make system calls here: other threads existed in the parent.
TEST(HostBuffer, IsKeptFromForkedChildren) {
  HostBuffer buffer(host(), 3'000'017, false);
  void* shared = mmap(nullptr, 3'000'017, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(shared, MAP_FAILED);
  std::vector<unsigned char> pages(to_pages(3'000'017) / page_size());
  const pid_t child = fork();
  ASSERT_GE(child, 0) << std::strerror(errno);
  if (child == 0) {
    const bool has_ordinary = mincore(shared, 3'000'017, pages.data()) == 0;
    const bool lacks_buffer = mincore(buffer.data(), buffer.size(), pages.data()) != 0 && errno == ENOMEM;
    _exit((has_ordinary ? 0 : 1) + (lacks_buffer ? 0 : 2));
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status) & 1, 0) << "the child lacks an ordinary mapping: this test cannot tell";
  EXPECT_EQ(WEXITSTATUS(status) & 2, 0) << "the child has the buffer";
  EXPECT_TRUE(is_mapped(buffer.data(), buffer.size()));
  EXPECT_EQ(munmap(shared, 3'000'017), 0);
}

TEST(HostBuffer, ManyThreadsMakeThem) {
  const auto device = host();
  const std::uint64_t before = HostBuffer::mapped_now();
  std::vector<std::jthread> threads;
  for (std::size_t t = 0; t < 5; ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t i = 0; i < 20; ++i) {
        const std::size_t bytes = 1 + t * 10'007 + i * 100'003;
        HostBuffer buffer(device, bytes, true);
        std::memset(buffer.data(), 1, bytes);
      }
    });
  }
  threads.clear();
  EXPECT_EQ(HostBuffer::mapped_now(), before);
}

TEST(Mapping, SaysWhatIsAvailable) {
  const auto available = memory::available_memory();
  ASSERT_TRUE(available.has_value());
  EXPECT_GT(available->memory, std::uint64_t{1} << 20);
}

// 2 MiB on most machines, 32 or 512 MiB on kernels for aarch64 with larger pages.
TEST(Mapping, LargeOnesBeginAtAHugePage) {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
  std::size_t huge = 0;
  if (!(file >> huge)) GTEST_SKIP() << "this kernel has no transparent huge pages";
  EXPECT_EQ(memory::huge_page_size(), huge);
  const auto available = memory::available_memory();
  if (!available || available->memory < 2 * huge) GTEST_SKIP() << "too little memory for a huge page of " << huge;
  for (const std::size_t bytes : {huge, huge + 1}) {
    const memory::Mapping mapping(bytes, -1);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(mapping.data()) % huge, 0u) << bytes;
    EXPECT_EQ(mapping.size(), to_pages(bytes));
    EXPECT_TRUE(is_present(mapping.data(), bytes)) << bytes;
  }
}

TEST(Numa, CountsNodesOfTheKernelsLists) {
  EXPECT_EQ(memory::count_nodes("0"), 1);
  EXPECT_EQ(memory::count_nodes("0-3"), 4);
  EXPECT_EQ(memory::count_nodes("0-1,4,6-7\n"), 0);  // the caller reads lines
  EXPECT_EQ(memory::count_nodes("0-1,4,6-7"), 5);
  EXPECT_EQ(memory::count_nodes(""), 0);
  EXPECT_EQ(memory::count_nodes("3-1"), 0);
  EXPECT_EQ(memory::count_nodes("a"), 0);
}

TEST(Numa, UnknownNodesAreNoPreference) {
  HostBuffer buffer(host(), 5'001, false);
  EXPECT_FALSE(memory::prefer_node(buffer.data(), page_size(), -1));
  EXPECT_FALSE(memory::prefer_node(buffer.data(), page_size(), 1'000'000));
}

TEST(Ring, HandsOutEachPieceOnce) {
  Ring ring(host(), 10'007, 5);
  EXPECT_EQ(ring.piece_bytes(), 10'007u);
  std::set<char*> pieces;
  for (int i = 0; i < 5; ++i) {
    auto* piece = static_cast<char*>(ring.acquire());
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece) % 4096, 0u);
    std::memset(piece, i + 1, 10'007);
    EXPECT_TRUE(pieces.insert(piece).second);
  }
  char* last = nullptr;
  std::set<char> values;
  for (char* piece : pieces) {
    if (last != nullptr) {
      EXPECT_GE(piece - last, 10'007);
    }
    EXPECT_EQ(piece[0], piece[10'006]);  // nobody wrote into a neighbour
    values.insert(piece[0]);
    last = piece;
  }
  EXPECT_EQ(values.size(), 5u);
  for (char* piece : pieces) ring.release(piece);
  EXPECT_NE(ring.acquire(), nullptr);
}

TEST(Ring, RefusesWhatIsNotOut) {
  Ring ring(host(), 5'000, 3);
  auto* piece = static_cast<char*>(ring.acquire());
  int local = 0;
  EXPECT_THROW(ring.release(&local), Error);
  EXPECT_THROW(ring.release(nullptr), Error);
  EXPECT_THROW(ring.release(piece + 1), Error);
  EXPECT_THROW(ring.release(piece + 3 * 8192), Error);
  ring.release(piece);
  EXPECT_THROW(ring.release(piece), Error);
}

TEST(Ring, RefusesImpossibleSizes) {
  EXPECT_THROW(Ring(host(), 0, 3), Error);
  EXPECT_THROW(Ring(host(), 3, 0), Error);
  EXPECT_THROW(Ring(host(), SIZE_MAX, 1), Error);
  EXPECT_THROW(Ring(host(), std::size_t{1} << 40, std::size_t{1} << 40), Error);
}

// More threads than pieces, each writing its mark: never two owners, never more out than there are.
TEST(Ring, HoldsProducersBack) {
  constexpr std::size_t kPieces = 3, kWords = 501;
  Ring ring(host(), kWords * sizeof(unsigned), kPieces);
  std::atomic<int> out{0}, most{0}, clashes{0};
  std::vector<std::jthread> threads;
  for (unsigned t = 1; t <= 8; ++t) {
    threads.emplace_back([&, t] {
      for (unsigned i = 0; i < 200; ++i) {
        auto* words = static_cast<unsigned*>(ring.acquire());
        const int now = ++out;
        int highest = most.load();
        while (highest < now && !most.compare_exchange_weak(highest, now)) {
        }
        std::fill(words, words + kWords, t * 1000 + i);
        std::this_thread::yield();
        if (std::count(words, words + kWords, t * 1000 + i) != kWords) ++clashes;
        --out;
        ring.release(words);
      }
    });
  }
  threads.clear();
  EXPECT_EQ(clashes.load(), 0);
  EXPECT_LE(most.load(), static_cast<int>(kPieces));
  EXPECT_EQ(out.load(), 0);
}

TEST(Ring, AFullRingBlocksUntilARelease) {
  Ring ring(host(), 4'097, 1);
  void* piece = ring.acquire();
  std::atomic<bool> released{false};
  std::jthread waiter([&] {
    void* again = ring.acquire();
    EXPECT_TRUE(released.load());  // fails if acquire() did not wait
    EXPECT_EQ(again, piece);
    ring.release(again);
  });
  std::this_thread::yield();
  released.store(true);
  ring.release(piece);
}

TEST(Ring, StopWakesEveryWaiterForGood) {
  Ring ring(host(), 4'097, 2);
  void* first = ring.acquire();
  void* second = ring.acquire();
  std::atomic<int> woken{0};
  {
    std::vector<std::jthread> waiters;
    for (int i = 0; i < 5; ++i) {
      waiters.emplace_back([&] {
        if (ring.acquire() == nullptr) ++woken;
      });
    }
    ring.stop();
  }
  EXPECT_EQ(woken.load(), 5);
  ring.release(first);
  ring.release(second);
  EXPECT_EQ(ring.acquire(), nullptr);
}

}  // namespace
}  // namespace slidecore
