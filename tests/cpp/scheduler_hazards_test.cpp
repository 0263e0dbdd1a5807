// The dependencies between lanes, streams and threads. Work is held back by gates, so that an order that a missing
// dependency would allow does come about.

#include <array>

#include "held_stream.h"
#include "scheduler_support.h"
#include "slidecore/scheduler.h"

namespace slidecore {
namespace {

using namespace testing_support;

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

// Another chunk's upload into the slot that its chunk has left is nothing to an update.
TEST(SchedulerHazards, AnUpdateWaitsForNoUploadOfOthers) {
  const auto device = host_device();
  HeldStream held(device);
  {
    Rig rig(device, equal_chunks(2, 5'003), {1}, 16);
    rig.scheduler->set_schedule(training_schedule(2));
    rig.scheduler->acquire(0, Phase::forward, held.handle());
    rig.scheduler->release(0, Phase::forward, held.handle());
    while (rig.scheduler->counters().uploads < 2) std::this_thread::yield();  // the second waits for the held visit
    rig.submit(0);
    for (int i = 0; i < 5000 && rig.sink->submissions == 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_EQ(rig.sink->submissions, 1u) << "the update of chunk 0 waits for the upload of chunk 1";
    held.open();
    rig.check_planes();
  }
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

// A gradient that is still being made holds up nobody, however soon its weights are needed.
TEST(SchedulerHazards, WhatHasLandedDoesNotWaitForWhatHasNot) {
  const auto device = host_device();
  HeldStream held(device);
  void* gradient = device->alloc(8192);
  HostBuffer zeros(device, 8192, true);
  {
    SchedulerOptions options = kSmallPieces;
    options.ring_pieces = 9;
    Rig rig(device, equal_chunks(2, 8192), {2}, 13, options);
    rig.scheduler->set_schedule(training_schedule(2));
    for (std::uint32_t c = 0; c < 2; ++c) rig.visit(c, Phase::forward);
    Gate gate;
    rig.sink->set_before([&](const char*, std::uint32_t) { gate.pass(); });
    rig.visit(1, Phase::backward);
    rig.submit(1);
    gate.wait_for_arrival();
    rig.visit(0, Phase::backward);
    device->to_device(gradient, zeros.data(), 8192, held.handle());
    rig.scheduler->submit_gradient(0, gradient, 8192, held.handle());
    while (rig.scheduler->counters().gradients < 2) std::this_thread::yield();
    gate.open();
    for (int i = 0; i < 5000 && rig.sink->submissions == 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_EQ(rig.sink->submissions, 1u) << "the update of chunk 1 waits for the gradient of chunk 0";
    held.open();
    rig.check_planes();
  }
  device->free(gradient);
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

// Saved inputs come back in any order, also those whose save has not run when they are asked for.
TEST(SchedulerInputs, ComeBackAsTheyWereSaved) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  const auto device = host_device();
  HeldStream held(device);
  Rig rig(device, equal_chunks(2, 4'001), {1}, seed);
  struct Input {
    Bytes original, host;
    void* device;
    Ticket saved, fetched;
  };
  std::vector<Input> inputs(60);
  for (Input& input : inputs) {
    const std::size_t bytes = draw<std::size_t>(random, 1, 9'000);
    input.original = random_bytes(bytes, random);
    input.host.resize(bytes);
    input.device = device->alloc(bytes);
    device->to_device(input.device, input.original.data(), bytes, held.handle());
    input.saved = rig.scheduler->save_input(0, input.host.data(), input.device, bytes, held.handle());
  }
  EXPECT_FALSE(rig.scheduler->done(inputs.front().saved));
  std::shuffle(inputs.begin(), inputs.end(), random);
  const StreamHandle other = device->create_stream();
  for (Input& input : inputs) {
    // Into another buffer, on another stream: only `after` orders this fetch behind the save.
    input.device = device->alloc(input.original.size());
    input.fetched =
        rig.scheduler->fetch_input(1, input.device, input.host.data(), input.original.size(), other, input.saved);
  }
  rig.visit(1, Phase::forward, other);
  let_others_run();
  held.open();
  std::vector<Bytes> seen;
  for (Input& input : inputs) seen.emplace_back(input.original.size());
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (i % 3 == 0) {
      rig.scheduler->wait(inputs[i].fetched, other);
      device->to_host(seen[i].data(), inputs[i].device, seen[i].size(), other);
    } else if (i % 3 == 1) {
      rig.scheduler->synchronize_ticket(inputs[i].fetched);
      EXPECT_TRUE(rig.scheduler->done(inputs[i].fetched));
      std::memcpy(seen[i].data(), inputs[i].device, seen[i].size());
    } else {
      while (!rig.scheduler->done(inputs[i].fetched)) std::this_thread::yield();
      std::memcpy(seen[i].data(), inputs[i].device, seen[i].size());
    }
  }
  device->synchronize(other);
  for (std::size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(seen[i] == inputs[i].original) << "input " << i;
  rig.scheduler->synchronize();
  rig.check_visits();
  for (const Input& input : inputs) {
    EXPECT_TRUE(rig.scheduler->done(input.saved));
    rig.scheduler->synchronize_ticket(input.saved);
    rig.scheduler->wait(input.saved, 0);
  }
  device->destroy_stream(other);
}

// A save behind a gradient in the download lane, and one of no bytes.
TEST(SchedulerInputs, AreSavedInTheOrderOfTheCalls) {
  Rig rig(host_device(), equal_chunks(1, 50'000), {1}, 10);
  Bytes host(8, 0), first(8, 1), second(8, 2);
  const Ticket gradient = rig.submit(0);
  rig.scheduler->save_input(0, host.data(), first.data(), 8, 0);
  const Ticket last = rig.scheduler->save_input(-1, host.data(), second.data(), 8, 0);
  const Ticket nothing = rig.scheduler->save_input(0, nullptr, nullptr, 0, 0);
  rig.scheduler->synchronize_ticket(last);
  EXPECT_EQ(host, second);
  EXPECT_TRUE(rig.scheduler->done(gradient));
  rig.scheduler->synchronize_ticket(nothing);
  rig.check_planes();
}

TEST(SchedulerInputs, TicketsThatWereNeverGivenAreRefused) {
  Rig rig(host_device(), equal_chunks(1, 10), {1}, 11);
  Scheduler& scheduler = *rig.scheduler;
  EXPECT_TRUE(scheduler.done(0));
  scheduler.wait(0, 0);
  scheduler.synchronize_ticket(0);
  Bytes host(4), memory(4);
  const Ticket next = scheduler.save_input(0, host.data(), memory.data(), 4, 0) + 1;
  for (const Ticket ticket : {next, ~Ticket{0}}) {
    const std::vector<std::string> text = {"no ticket " + std::to_string(ticket)};
    expect_error(Code::invalid_argument, text, [&] { scheduler.done(ticket); });
    expect_error(Code::invalid_argument, text, [&] { scheduler.wait(ticket, 0); });
    expect_error(Code::invalid_argument, text, [&] { scheduler.synchronize_ticket(ticket); });
    expect_error(Code::invalid_argument, text,
                 [&] { scheduler.fetch_input(0, memory.data(), host.data(), 4, 0, ticket); });
  }
  scheduler.synchronize_ticket(scheduler.fetch_input(0, memory.data(), host.data(), 4, 0, next - 1));
  scheduler.synchronize();
}

// While a thread waits for a ticket, the ticket is retired: its event is not recorded for something else meanwhile.
TEST(SchedulerInputs, AWaitForATicketIsNotALongerOne) {
  Gate gate;
  std::atomic<bool> armed{false};
  HookedDevice hooked([&](const char* function) {
    if (std::string(function) == "event_synchronize" && armed.exchange(false)) gate.pass();
    return 0;
  });
  HeldStream held(hooked.device());
  Rig rig(hooked.device(), equal_chunks(1, 10), {1}, 12);
  Bytes host(4), memory(4);
  const auto save = [&](StreamHandle stream) {
    return rig.scheduler->save_input(0, host.data(), memory.data(), 4, stream);
  };
  const Ticket ticket = save(0);
  rig.scheduler->synchronize();
  armed = true;
  std::thread waiter([&] { rig.scheduler->synchronize_ticket(ticket); });
  gate.wait_for_arrival();
  for (int i = 0; i < 4; ++i) save(held.handle());
  gate.open();
  waiter.join();  // although the stream is still held
  held.open();
  rig.scheduler->synchronize();
}

// Threads train chunks of their own through one window, with inputs saved and fetched, and a trace.
TEST(SchedulerThreads, VisitDifferentChunksAtOnce) {
  constexpr std::uint32_t threads = 4, chunks = 3;
  constexpr std::size_t bytes = 10'001;
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  const auto device = host_device();
  std::array<StreamHandle, threads> streams{};
  for (std::uint32_t t = 1; t < threads; ++t) streams[t] = device->create_stream();  // the first uses stream 0
  {
    Rig rig(device, equal_chunks(threads * chunks, bytes), {threads + 1}, seed);
    rig.scheduler->set_schedule(training_schedule(threads * chunks));
    rig.scheduler->start_trace();
    const auto work = [&](std::uint32_t t) {
      Random random(seed + t);
      const StreamHandle stream = streams[t];
      void* gradient = device->alloc(bytes);
      void* input = device->alloc(bytes);
      Bytes source(bytes), seen(bytes), host(bytes), back(bytes);
      Ticket landed = 0;
      for (int call = 0; call < 40; ++call) {
        const std::uint32_t chunk = t * chunks + draw<std::uint32_t>(random, 0, chunks - 1);
        Bytes& expected = rig.expected[chunk];
        const Phase phase = call % 2 == 0 ? Phase::forward : Phase::backward;
        const void* slot = rig.scheduler->acquire(chunk, phase, stream);
        device->to_host(seen.data(), slot, bytes, stream);
        device->to_device(input, expected.data(), bytes, stream);
        rig.scheduler->release(chunk, phase, stream);
        const auto label = static_cast<std::int32_t>(chunk);
        const Ticket saved = rig.scheduler->save_input(label, host.data(), input, bytes, stream);
        const Ticket fetched = rig.scheduler->fetch_input(label, input, host.data(), bytes, stream, saved);
        rig.scheduler->wait(fetched, stream);
        device->to_host(back.data(), input, bytes, stream);
        device->synchronize(stream);
        EXPECT_TRUE(seen == expected) << "thread " << t << ", call " << call << ", " << Rig::name(chunk);
        EXPECT_TRUE(back == expected);
        if (phase == Phase::forward) continue;
        rig.scheduler->synchronize_ticket(landed);
        randomize(source.data(), bytes, random);
        device->to_device(gradient, source.data(), bytes, stream);
        landed = rig.scheduler->submit_gradient(chunk, gradient, bytes, stream);
        for (std::size_t i = 0; i < bytes; ++i) expected[i] = static_cast<unsigned char>(expected[i] - source[i]);
        device->synchronize(stream);  // the source is filled again
      }
      rig.scheduler->synchronize_ticket(landed);
    };
    std::vector<std::thread> workers;
    for (std::uint32_t t = 0; t < threads; ++t) workers.emplace_back(work, t);
    for (std::thread& worker : workers) worker.join();
    rig.check_planes();
    rig.scheduler->stop_trace();
    EXPECT_EQ(rig.scheduler->counters().visits, threads * 40u);
  }
  for (std::uint32_t t = 1; t < threads; ++t) device->destroy_stream(streams[t]);
}

// All threads visit all chunks, which nobody changes.
TEST(SchedulerThreads, ShareChunks) {
  constexpr std::uint32_t threads = 4;
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Rig rig(host_device(), equal_chunks(6, 5'001), {threads}, seed);
  rig.scheduler->set_schedule(forward_schedule(6));
  std::vector<std::thread> workers;
  for (std::uint32_t t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      Random random(seed + t);
      for (int call = 0; call < 100; ++call) {
        const auto chunk = draw<std::uint32_t>(random, 0, 5);
        const void* slot = rig.scheduler->acquire(chunk, Phase::forward, 0);
        EXPECT_EQ(std::memcmp(slot, rig.expected[chunk].data(), 5'001), 0) << "thread " << t << ", call " << call;
        rig.scheduler->release(chunk, Phase::forward, 0);
        if (call % 20 == 0) rig.scheduler->synchronize();
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  rig.check_planes();
}

// A policy and its reference: one trains, the other is read, on one device and on one of its own.
TEST(SchedulerThreads, SeveralSchedulersLiveInOneProcess) {
  const auto shared = host_device();
  std::vector<std::thread> workers;
  for (unsigned t = 0; t < 4; ++t) {
    workers.emplace_back([&, t] {
      Rig rig(t % 2 == 0 ? shared : host_device(), equal_chunks(4, 7'001), {1 + t % 3}, t);
      Rig reference(rig.device, equal_chunks(4, 7'001), {2}, t + 100);
      rig.scheduler->set_schedule(training_schedule(4));
      reference.scheduler->set_schedule(forward_schedule(4));
      for (int step = 0; step < 5; ++step) {
        for (std::uint32_t c = 0; c < 4; ++c) reference.visit(c, Phase::forward);
        rig.step();
      }
      rig.check_planes();
      reference.check_planes();
      EXPECT_EQ(reference.sink->submissions, 0u);
    });
  }
  for (std::thread& worker : workers) worker.join();
}

}  // namespace
}  // namespace slidecore
