#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/optimizer/cpu_quota.h"
#include "slidecore/optimizer.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

TEST(ThreadPool, CoversEveryElementOnceInFixedBlocks) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const std::size_t n : {0, 1, 7, 8, 9, 64, 1000, 4097}) {
      for (const std::size_t block : {1, 8, 1000, 100000}) {
        std::vector<int> hits(n, 0);
        pool.run(n, block, [&](std::size_t begin, std::size_t end) {
          EXPECT_EQ(begin % block, 0u);
          EXPECT_EQ(end, std::min(n, begin + block));
          for (std::size_t i = begin; i < end; ++i) ++hits[i];
        });
        EXPECT_EQ(std::accumulate(hits.begin(), hits.end(), std::size_t{0}), n);
        for (const int hit : hits) ASSERT_EQ(hit, 1);
      }
    }
  }
}

TEST(ThreadPool, ManyShortRuns) {
  ThreadPool pool(4);
  std::size_t total = 0;
  for (int i = 0; i < 5000; ++i) {
    std::atomic<std::size_t> sum{0};
    pool.run(16, 1, [&](std::size_t begin, std::size_t) { sum += begin; });
    total += sum;
  }
  EXPECT_EQ(total, 5000u * 120u);
}

TEST(ThreadPool, WakesAfterIdling) {
  ThreadPool pool(3);
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic<int> blocks{0};
    pool.run(100, 1, [&](std::size_t, std::size_t) { ++blocks; });
    EXPECT_EQ(blocks, 100);
  }
}

TEST(ThreadPool, UsesSeveralThreads) {
  ThreadPool pool(2);
  std::atomic<int> arrived{0};
  // Each of the two blocks waits for the other, which one thread alone could never satisfy.
  pool.run(2, 1, [&](std::size_t, std::size_t) {
    ++arrived;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (arrived < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    EXPECT_EQ(arrived, 2);
  });
}

TEST(ThreadPool, RethrowsAndStaysUsable) {
  for (const int threads : {1, 4}) {
    ThreadPool pool(threads);
    for (std::size_t bad = 0; bad < 20; ++bad) {
      EXPECT_THROW(pool.run(20, 1,
                            [&](std::size_t begin, std::size_t) {
                              if (begin == bad) throw std::runtime_error("block");
                            }),
                   std::runtime_error);
      std::atomic<int> blocks{0};
      pool.run(20, 1, [&](std::size_t, std::size_t) { ++blocks; });
      EXPECT_EQ(blocks, 20);
    }
    EXPECT_THROW(pool.run(20, 1, [](std::size_t, std::size_t) { throw std::runtime_error("all"); }),
                 std::runtime_error);
  }
}

TEST(ThreadPool, RunsOfSeveralThreadsTakeTurns) {
  ThreadPool pool(3);
  std::vector<std::thread> callers;
  std::atomic<int> blocks{0};
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int j = 0; j < 100; ++j) pool.run(10, 1, [&](std::size_t, std::size_t) { ++blocks; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(blocks, 4 * 100 * 10);
}

TEST(ThreadPool, RunInsideABodyIsServed) {
  ThreadPool pool(2);
  std::atomic<int> inner{0};
  pool.run(4, 1, [&](std::size_t, std::size_t) { pool.run(5, 1, [&](std::size_t, std::size_t) { ++inner; }); });
  EXPECT_EQ(inner, 20);
}

TEST(ThreadPool, StartsAndStopsWithoutWork) {
  for (int i = 0; i < 50; ++i) ThreadPool pool(4);
}

TEST(ThreadPool, RefusesBadArguments) {
  EXPECT_THROW(ThreadPool(-1), Error);
  EXPECT_THROW(ThreadPool(1000000), Error);
  ThreadPool pool(1);
  EXPECT_THROW(pool.run(1, 0, [](std::size_t, std::size_t) {}), Error);
}

TEST(ThreadPool, CountFromTheEnvironment) {
  for (const char* good : {"1", "3"}) {
    ::setenv("SLIDECORE_THREADS", good, 1);
    EXPECT_EQ(ThreadPool().threads(), std::atoi(good));
    EXPECT_EQ(ThreadPool(2).threads(), 2) << "an explicit count wins";
  }
  for (const char* bad : {"0", "-2", "two", "2x", "1.5", "99999999999999999999"}) {
    ::setenv("SLIDECORE_THREADS", bad, 1);
    try {
      ThreadPool pool;
      ADD_FAILURE() << bad << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::invalid_argument);
      EXPECT_NE(std::string(error.what()).find(bad), std::string::npos);
    }
  }
  ::unsetenv("SLIDECORE_THREADS");
  EXPECT_EQ(ThreadPool().threads(), std::max(1, usable_cpus() - 1));
}

#if !defined(__SANITIZE_THREAD__)  // which supports no threads after a fork
TEST(ThreadPool, AForkedChildNeitherHangsNorJoins) {
  auto pool = std::make_unique<ThreadPool>(3);
  pool->run(8, 1, [](std::size_t, std::size_t) {});
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::alarm(20);
    std::size_t sum = 0;
    pool->run(8, 1, [&](std::size_t begin, std::size_t) { sum += begin; });
    pool.reset();
    ::_exit(sum == 28 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

TEST(ParallelCopy, CopiesAnySize) {
  ThreadPool pool(2);
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{4097}, (std::size_t{9} << 20) + 3}) {
    std::vector<char> from(bytes), to(bytes + 1, 'x');
    for (std::size_t i = 0; i < bytes; ++i) from[i] = static_cast<char>(i * 31);
    parallel_copy(pool, to.data(), from.data(), bytes);
    EXPECT_TRUE(std::equal(from.begin(), from.end(), to.begin()));
    EXPECT_EQ(to.back(), 'x');
  }
}

TEST(UsableCpus, IsAtLeastOneAndAtMostTheMachine) {
  EXPECT_GE(usable_cpus(), 1);
  EXPECT_LE(usable_cpus(), static_cast<int>(std::thread::hardware_concurrency()));
}

class CpuQuota : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "slidecore-quota-XXXXXX";
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_ + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  std::string root_;
};

TEST_F(CpuQuota, NothingToReadIsNoLimit) {
  EXPECT_TRUE(std::isinf(cgroup_cpu_quota(root_)));
}

TEST_F(CpuQuota, Version2TakesTheTightestAncestor) {
  write("/proc/self/cgroup", "0::/a/b\n");
  write("/proc/self/mountinfo", "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");
  write("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  EXPECT_TRUE(std::isinf(cgroup_cpu_quota(root_)));
  write("/sys/fs/cgroup/a/cpu.max", "250000 100000\n");
  EXPECT_DOUBLE_EQ(cgroup_cpu_quota(root_), 2.5);
  write("/sys/fs/cgroup/a/b/cpu.max", "400000 100000\n");
  EXPECT_DOUBLE_EQ(cgroup_cpu_quota(root_), 2.5);
  write("/sys/fs/cgroup/a/b/cpu.max", "50000 100000\n");
  EXPECT_DOUBLE_EQ(cgroup_cpu_quota(root_), 0.5);
}

TEST_F(CpuQuota, Version2InAContainersNamespace) {
  write("/proc/self/cgroup", "0::/\n");
  write("/proc/self/mountinfo", "30 25 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
  write("/sys/fs/cgroup/cpu.max", "300000 100000\n");
  EXPECT_DOUBLE_EQ(cgroup_cpu_quota(root_), 3);
}

TEST_F(CpuQuota, Version1WithTheMountShowingPartOfTheTree) {
  write("/proc/self/cgroup", "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n3:cpuset:/docker/x\n");
  write("/proc/self/mountinfo",
        "31 25 0:27 /docker/x /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n"
        "32 25 0:28 /docker/x /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n");
  write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
  EXPECT_TRUE(std::isinf(cgroup_cpu_quota(root_)));
  write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "150000\n");
  EXPECT_DOUBLE_EQ(cgroup_cpu_quota(root_), 1.5);
}

}  // namespace
}  // namespace slidecore
