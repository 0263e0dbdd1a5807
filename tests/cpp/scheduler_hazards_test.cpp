// The dependencies between lanes, streams and threads. Work is held back by gates, so that an order that a missing
// dependency would allow does come about.

#include "device/host_event.h"
#include "device/host_stream.h"
#include "scheduler_support.h"
#include "slidecore/scheduler.h"

namespace slidecore {
namespace {

using namespace testing_support;

// A stream of the host backend whose work waits until open().
class HeldStream {
 public:
  explicit HeldStream(std::shared_ptr<Device> device) : device_(std::move(device)), stream_(device_->create_stream()) {
    hold();
  }
  ~HeldStream() {
    open();
    device_->destroy_stream(stream_);
  }
  HeldStream(const HeldStream&) = delete;
  HeldStream& operator=(const HeldStream&) = delete;

  // What is enqueued from now on waits for the next open().
  void hold() {
    gate_ = std::make_shared<device::HostRecord>();
    reinterpret_cast<device::HostStream*>(stream_)->enqueue(device::HostTask::make_wait(gate_));
  }
  void open() {
    if (gate_) gate_->complete();
    gate_ = nullptr;
  }
  StreamHandle handle() const { return stream_; }

 private:
  std::shared_ptr<Device> device_;
  StreamHandle stream_;
  std::shared_ptr<device::HostRecord> gate_;
};

// Gives what is not held back the time to run ahead. Tests are right without it, but would miss a missing dependency.
void let_others_run() {
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

TEST(SchedulerHazards, AnUploadIntoASlotWaitsForTheVisitsWork) {
  const auto device = host_device();
  HeldStream held(device);
  const StreamHandle other = device->create_stream();
  {
    Rig rig(device, equal_chunks(2, 30'001), {1}, 1);
    const void* slot = rig.scheduler->acquire(0, Phase::forward, held.handle());
    rig.read(slot, 0, held.handle());
    rig.scheduler->release(0, Phase::forward, held.handle());
    rig.visit(1, Phase::forward, other);
    let_others_run();
    held.open();
    rig.check_visits();
  }
  device->destroy_stream(other);
}

// Visits of one slot on two streams: the upload waits for both, and no call waits for either.
TEST(SchedulerHazards, AnUploadIntoASlotWaitsForVisitsOnEveryStream) {
  for (const bool held_last : {false, true}) {
    const auto device = host_device();
    HeldStream held(device);
    const StreamHandle other = device->create_stream();
    {
      Rig rig(device, equal_chunks(2, 30'001), {1}, 2);
      rig.scheduler->acquire(0, Phase::forward, held.handle());
      const void* slot = rig.acquire(0, Phase::forward, 0);
      rig.read(slot, 0, held.handle());
      rig.scheduler->release(0, Phase::forward, held_last ? 0 : held.handle());
      rig.scheduler->release(0, Phase::forward, held_last ? held.handle() : 0);
      rig.visit(1, Phase::forward, other);
      let_others_run();
      held.open();
      rig.check_visits();
      for (int i = 0; i < 3; ++i) {
        for (const std::uint32_t chunk : {0, 1}) rig.visit(chunk, Phase::backward, i % 2 == 0 ? other : held.handle());
      }
      rig.check_visits();
    }
    device->destroy_stream(other);
  }
}

TEST(SchedulerHazards, AnUpdateWaitsForUploadsThatReadItsPlane) {
  const auto device = host_device();
  HeldStream held(device);
  const StreamHandle other = device->create_stream();
  {
    Rig rig(device, equal_chunks(2, 20'011), {1}, 3);
    rig.visit(0, Phase::forward, held.handle());
    // Its upload is enqueued behind the held visit; its gradient, which needs no visit here, comes at once.
    rig.visit(1, Phase::backward, other);
    const Ticket landing = rig.submit(1);
    let_others_run();
    held.open();
    rig.scheduler->synchronize_ticket(landing);
    rig.check_visits();
    rig.visit(1, Phase::forward, other);
    rig.check_visits();
    rig.check_planes();
  }
  device->destroy_stream(other);
}

TEST(SchedulerHazards, AnUploadWaitsForSubmittedUpdates) {
  Rig rig(host_device(), equal_chunks(3, 9'001), {2}, 4);
  Gate gate;
  rig.visit(0, Phase::backward);
  rig.scheduler->synchronize();
  rig.sink->set_before([&](const char*, std::uint32_t) { gate.pass(); });
  rig.submit(0);
  rig.submit(0);
  std::thread visitor([&] { rig.visit(0, Phase::forward); });
  gate.wait_for_arrival();
  let_others_run();
  EXPECT_EQ(rig.scheduler->counters().uploads, 1u);
  gate.open();
  visitor.join();
  rig.check_planes();
}

TEST(SchedulerHazards, ADownloadWaitsForTheWorkThatFillsTheGradient) {
  const auto device = host_device();
  HeldStream held(device);
  Rig rig(device, equal_chunks(2, 10'007), {1}, 5);
  Random random(5);
  const Bytes gradient = random_bytes(10'007, random);
  void* buffer = device->alloc(10'007);
  device->to_device(buffer, gradient.data(), gradient.size(), held.handle());
  const Ticket ticket = rig.scheduler->submit_gradient(0, buffer, gradient.size(), held.handle());
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    rig.expected[0][i] = static_cast<unsigned char>(rig.expected[0][i] - gradient[i]);
  }
  let_others_run();
  EXPECT_FALSE(rig.scheduler->done(ticket));
  rig.visit(1, Phase::forward);  // not held back
  held.open();
  rig.scheduler->synchronize_ticket(ticket);
  std::memset(buffer, 0, gradient.size());
  rig.visit(0, Phase::forward);
  rig.check_planes();
}

// The update was taken from its queue and waits for an upload that is being put on the stream.
TEST(SchedulerHazards, SynchronizeWaitsForAnUpdateThatHasNotBegun) {
  for (int round = 0; round < 30; ++round) {
    Gate gate;
    std::atomic<bool> first{true};
    HookedDevice hooked([&](const char* function) {
      if (std::string(function) == "copy_to_device" && first.exchange(false)) gate.pass();
      return 0;
    });
    Rig rig(hooked.device(), equal_chunks(1, 500), {1}, 6);
    rig.scheduler->set_schedule(forward_schedule(1));
    gate.wait_for_arrival();
    rig.scheduler->set_schedule({});  // no upload is queued behind the update, which synchronize() would wait for
    rig.scheduler->synchronize_ticket(rig.submit(0));
    // Many, as it takes one that is quicker than the update lane when both are woken.
    std::vector<std::thread> waiters;
    for (int i = 0; i < 8; ++i) {
      waiters.emplace_back([&] {
        rig.scheduler->synchronize();
        EXPECT_EQ(rig.sink->submissions, 1u);
      });
    }
    let_others_run();
    gate.open();
    for (std::thread& waiter : waiters) waiter.join();
  }
}

// The upload that a visit waits for was to bring weights that changed in the meantime: it brings the new ones.
TEST(SchedulerHazards, AVisitThatWaitsOutlastsChangesOfItsWeights) {
  for (const bool submits : {false, true}) {
    Rig rig(host_device(), equal_chunks(2, 5'003), {2}, 7);
    Gate gate;
    rig.sink->set_before([&](const char*, std::uint32_t) { gate.pass(); });
    rig.submit(0);
    gate.wait_for_arrival();
    Bytes seen(5'003);
    std::thread visitor([&] {
      std::memcpy(seen.data(), rig.scheduler->acquire(0, Phase::forward, 0), seen.size());
      rig.scheduler->release(0, Phase::forward, 0);
    });
    while (rig.scheduler->counters().visits == 0) std::this_thread::yield();
    if (submits) {
      rig.submit(0);
    } else {
      rig.scheduler->invalidate(0);
    }
    gate.open();
    visitor.join();
    EXPECT_EQ(seen, rig.expected[0]);
    rig.visit(0, Phase::forward);
    rig.visit(1, Phase::forward);
    rig.check_planes();
  }
}

// Two threads visit one chunk, with an update between their acquires: they are in different slots.
TEST(SchedulerHazards, AThreadReleasesItsOwnVisit) {
  Rig rig(host_device(), equal_chunks(2, 5'003), {2}, 8);
  Gate acquired, released;
  std::thread early([&] {
    rig.scheduler->acquire(0, Phase::forward, 0);
    acquired.pass();
    rig.scheduler->release(0, Phase::forward, 0);
    released.open();
  });
  acquired.wait_for_arrival();
  rig.submit(0);
  void* slot = rig.acquire(0, Phase::forward);
  acquired.open();
  released.pass();
  rig.visit(1, Phase::forward);  // where the early visit was
  rig.scheduler->synchronize();
  rig.read(slot, 0, 0);
  rig.scheduler->release(0, Phase::forward, 0);
  early.join();
  expect_error(Code::state, {"'chunk 0'"}, [&] { rig.scheduler->release(0, Phase::forward, 0); });
}

// A visit may end on another thread than it began on.
TEST(SchedulerHazards, AnotherThreadMayReleaseAVisit) {
  Rig rig(host_device(), equal_chunks(2, 77), {1}, 9);
  rig.acquire(0, Phase::forward);
  std::thread([&] { rig.scheduler->release(0, Phase::forward, 0); }).join();
  rig.visit(1, Phase::forward);
}

}  // namespace
}  // namespace slidecore
