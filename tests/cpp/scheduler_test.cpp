// Weights that visits find, planes that updates leave behind, and what the schedule saves in uploads.

#include "slidecore/scheduler.h"

#include <map>
#include <set>

#include "scheduler_support.h"
#include "slidecore/adamw_sink.h"
#include "slidecore/optimizer.h"

namespace slidecore {
namespace {

using namespace testing_support;

TEST(SchedulerResults, RandomShapesEqualASequentialReference) {
  for (int round = 0; round < 12; ++round) {
    const unsigned seed = new_seed();
    SCOPED_TRACE(seed_text(seed));
    Random random(seed);
    std::vector<std::size_t> windows(draw<std::size_t>(random, 1, 3));
    for (auto& slots : windows) slots = draw<std::size_t>(random, 1, 4);
    std::vector<ChunkShape> chunks(draw<std::size_t>(random, 1, 7));
    for (auto& chunk : chunks) {
      chunk.bytes = draw<std::size_t>(random, 0, 20'000) * 2 + 1;
      chunk.window = static_cast<std::uint32_t>(draw<std::size_t>(random, 0, windows.size() - 1));
    }
    const auto device = host_device();
    const StreamHandle stream = round % 2 == 0 ? 0 : device->create_stream();
    {
      SchedulerOptions options = kSmallPieces;
      options.piece_bytes = draw<std::size_t>(random, 1, 3) * 4096;
      options.ring_pieces = draw<std::size_t>(random, 2, 5);
      Rig rig(device, chunks, windows, seed, options);
      if (round % 3 != 2) rig.scheduler->set_schedule(training_schedule(chunks.size()));
      for (int step = 0; step < 4; ++step) rig.step(stream);
      rig.check_visits();
      rig.check_planes();
      EXPECT_EQ(rig.sink->submissions, 4 * chunks.size());
      EXPECT_EQ(rig.scheduler->counters().gradients, 4 * chunks.size());
      EXPECT_EQ(rig.scheduler->counters().visits, 8 * chunks.size());
      EXPECT_EQ(rig.scheduler->counters().unscheduled_visits, round % 3 != 2 ? 0 : 8 * chunks.size());
    }
    if (stream != 0) device->destroy_stream(stream);
  }
}

TEST(SchedulerResults, AChunkWithoutBytesIsVisitedLikeAnyOther) {
  Rig rig(host_device(), {{1001}, {0}, {5}}, {2}, 1);
  rig.scheduler->set_schedule(training_schedule(3));
  for (int step = 0; step < 3; ++step) rig.step();
  rig.check_planes();
  expect_error(Code::invalid_argument, {"chunk 1", "empty"}, [&] { rig.scheduler->submit_gradient(1, nullptr, 0, 0); });
}

// The update of the whole chain: bfloat16 weights are uploaded as the real sink wrote them.
TEST(SchedulerResults, AdamWStepsEqualDirectUpdates) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  struct State {
    std::size_t n;
    std::vector<std::uint16_t> weight;
    std::vector<std::int16_t> residual;
    std::vector<float> exp_avg, exp_avg_sq;
    AdamWPlanes planes() { return {weight.data(), residual.data(), nullptr, exp_avg.data(), exp_avg_sq.data()}; }
  };
  const auto device = host_device();
  const auto pool = std::make_shared<ThreadPool>(2);
  const auto sink = std::make_shared<AdamWSink>(pool);
  std::vector<State> states, reference;
  for (const std::size_t n : {2049, 7777, 1, 4096}) {
    State state{n, std::vector<std::uint16_t>(n), std::vector<std::int16_t>(n), std::vector<float>(n),
                std::vector<float>(n)};
    for (auto& w : state.weight) w = static_cast<std::uint16_t>(0x3c00 + random() % 512);
    states.push_back(state);
  }
  reference = states;
  WindowSpec window{{}, 7777 * 2};
  for (int s = 0; s < 2; ++s) window.slots.push_back(device->alloc(window.slot_bytes));
  std::vector<ChunkSpec> chunks;
  for (State& state : states) {
    sink->add_chunk(state.planes(), state.n, GradientType::bfloat16);
    chunks.push_back({Rig::name(chunks.size()), state.weight.data(), state.n * 2, 0});
  }
  Scheduler scheduler(device, chunks, {window}, sink, kSmallPieces);
  scheduler.set_schedule(training_schedule(states.size()));
  const auto visit = [&](std::size_t c, Phase phase) {
    const void* slot = scheduler.acquire(static_cast<std::uint32_t>(c), phase, 0);
    EXPECT_EQ(std::memcmp(slot, reference[c].weight.data(), reference[c].n * 2), 0) << Rig::name(c);
    scheduler.release(static_cast<std::uint32_t>(c), phase, 0);
  };
  std::vector<std::vector<std::uint16_t>> gradients(states.size());
  std::vector<Ticket> tickets(states.size(), 0);
  for (std::int64_t step = 1; step <= 5; ++step) {
    for (std::size_t c = 0; c < states.size(); ++c) visit(c, Phase::forward);
    for (std::size_t c = states.size(); c-- > 0;) {
      visit(c, Phase::backward);
      scheduler.synchronize_ticket(tickets[c]);
      gradients[c].resize(states[c].n);
      for (auto& g : gradients[c]) g = static_cast<std::uint16_t>(0x3a00 + random() % 512 + (random() % 2) * 0x8000);
      const AdamWHyper hyper{.lr = 1e-2, .weight_decay = 0.1, .step = step};
      sink->prepare(static_cast<std::uint32_t>(c), {{0, states[c].n, hyper}});
      tickets[c] = scheduler.submit_gradient(static_cast<std::uint32_t>(c), gradients[c].data(), states[c].n * 2, 0);
      adamw(*pool, hyper, reference[c].planes(), gradients[c].data(), GradientType::bfloat16, states[c].n);
    }
  }
  scheduler.synchronize();
  for (std::size_t c = 0; c < states.size(); ++c) {
    EXPECT_EQ(states[c].weight, reference[c].weight);
    EXPECT_EQ(states[c].residual, reference[c].residual);
    EXPECT_EQ(states[c].exp_avg, reference[c].exp_avg);
    EXPECT_EQ(states[c].exp_avg_sq, reference[c].exp_avg_sq);
  }
}

// The full ring holds the download back, and the ticket with it, until the sink goes on.
TEST(SchedulerResults, AFullRingHoldsTheDownloadBack) {
  SchedulerOptions options = kSmallPieces;
  options.ring_pieces = 2;
  Rig rig(host_device(), {{40 * 4096 + 13}, {4096}, {4095}}, {1}, 2, options);
  Gate gate;
  rig.sink->set_before([&](const char*, std::uint32_t) { gate.pass(); });
  rig.visit(0, Phase::backward);
  const Ticket large = rig.submit(0);
  gate.wait_for_arrival();
  const Ticket behind = rig.submit(1);
  EXPECT_FALSE(rig.scheduler->done(large));
  EXPECT_FALSE(rig.scheduler->done(behind));
  rig.visit(2, Phase::forward);  // what does not depend on the update goes on
  gate.open();
  rig.scheduler->synchronize_ticket(behind);
  EXPECT_TRUE(rig.scheduler->done(large));
  rig.visit(0, Phase::forward);
  rig.submit(2);
  rig.check_planes();
  EXPECT_EQ(rig.sink->pieces, 41u + 1u + 1u);
}

TEST(SchedulerResults, InvalidateMakesTheNextVisitUploadAgain) {
  Rig rig(host_device(), equal_chunks(3, 999), {3}, 3);
  rig.scheduler->set_schedule(forward_schedule(3));
  for (std::uint32_t c = 0; c < 3; ++c) rig.visit(c, Phase::forward);
  rig.scheduler->synchronize();
  Random random(3);
  for (std::uint32_t c = 0; c < 3; ++c) {
    rig.expected[c] = random_bytes(999, random);
    std::memcpy(rig.planes[c]->data(), rig.expected[c].data(), 999);
    rig.scheduler->invalidate(c);
  }
  for (std::uint32_t c = 0; c < 3; ++c) rig.visit(c, Phase::forward);
  EXPECT_EQ(rig.uploads(), 6u);
  expect_error(Code::invalid_argument, {"no chunk 3"}, [&] { rig.scheduler->invalidate(3); });
}

// The fewest uploads that serve `visits` with `slots` slots, which a visit's chunk must be in; an update makes the
// chunk's copy stale. Exhaustive: over every set of chunks that could be there after each visit.
std::size_t fewest_uploads(const std::vector<Visit>& visits, std::size_t slots) {
  std::map<std::set<std::uint32_t>, std::size_t> cost{{{}, 0}};
  for (const Visit& visit : visits) {
    std::map<std::set<std::uint32_t>, std::size_t> next;
    const auto reach = [&](std::set<std::uint32_t> held, std::size_t uploads) {
      if (visit.updates) held.erase(visit.chunk);
      const auto [at, fresh] = next.emplace(std::move(held), uploads);
      if (!fresh) at->second = std::min(at->second, uploads);
    };
    for (const auto& [held, uploads] : cost) {
      if (held.count(visit.chunk) != 0) {
        reach(held, uploads);
        continue;
      }
      std::set<std::uint32_t> with = held;
      with.insert(visit.chunk);
      if (with.size() <= slots) {
        reach(with, uploads + 1);
        continue;
      }
      for (const std::uint32_t victim : held) {
        std::set<std::uint32_t> without = with;
        without.erase(victim);
        reach(without, uploads + 1);
      }
    }
    cost = std::move(next);
  }
  std::size_t fewest = static_cast<std::size_t>(-1);
  for (const auto& [held, uploads] : cost) fewest = std::min(fewest, uploads);
  return fewest;
}

// A chunk still in its slot at the turn is not uploaded again, and no order of evictions would do with less.
TEST(SchedulerSchedule, TrainingUploadsAreTheFewestPossible) {
  constexpr std::size_t steps = 3;
  for (const std::size_t chunks : {1, 2, 3, 5, 6}) {
    for (std::size_t slots = 1; slots <= 4; ++slots) {
      SCOPED_TRACE(std::to_string(chunks) + " chunks, " + std::to_string(slots) + " slots");
      const std::size_t kept = std::min(chunks, slots);
      std::vector<Visit> visits;
      for (std::size_t step = 0; step < steps; ++step) {
        for (const Visit& visit : training_schedule(chunks)) visits.push_back(visit);
      }
      ASSERT_EQ(fewest_uploads(visits, slots), steps * (2 * chunks - kept));
      Rig rig(host_device(), equal_chunks(chunks, 777), {slots}, 4);
      rig.scheduler->set_schedule(training_schedule(chunks));
      for (std::size_t step = 1; step <= steps; ++step) {
        rig.step();
        // What the next step starts with is on its way already.
        EXPECT_EQ(rig.uploads(), step * (2 * chunks - kept) + kept);
      }
      EXPECT_EQ(rig.scheduler->counters().upload_bytes, rig.uploads() * 777);
      EXPECT_EQ(rig.scheduler->counters().unscheduled_visits, 0u);
    }
  }
}

// After each call the window holds the visit's chunk and those that come next, and nothing is uploaded that was there.
TEST(SchedulerSchedule, TheWindowHoldsWhatComesNext) {
  for (int round = 0; round < 10; ++round) {
    const unsigned seed = new_seed();
    SCOPED_TRACE(seed_text(seed));
    Random random(seed);
    const std::size_t chunks = draw<std::size_t>(random, 2, 6), slots = draw<std::size_t>(random, 1, 4);
    std::vector<Visit> schedule;
    for (std::size_t i = draw<std::size_t>(random, 2, 12); i > 0; --i) {
      schedule.push_back({static_cast<std::uint32_t>(draw<std::size_t>(random, 0, chunks - 1)),
                          random() % 2 == 0 ? Phase::forward : Phase::backward});
    }
    Rig rig(host_device(), equal_chunks(chunks, 101), {slots}, seed);
    std::set<std::uint32_t> held;
    std::uint64_t uploads = 0;
    // Claims slots for the chunks of the visits from `position` on, beside that of a visit in progress.
    const auto expect_held = [&](std::size_t position, std::optional<std::uint32_t> visited) {
      std::set<std::uint32_t> next;
      if (visited) next.insert(*visited);
      for (std::size_t k = 0; k < schedule.size() && next.size() < slots; ++k) {
        next.insert(schedule[(position + k) % schedule.size()].chunk);
      }
      for (const std::uint32_t chunk : next) uploads += held.count(chunk) == 0;
      // What is not asked for stays where there is room: a slot is emptied only for another chunk.
      ASSERT_LE(next.size(), slots);
      if (next.size() == slots) {
        held = next;
      } else {
        held.insert(next.begin(), next.end());
      }
      EXPECT_EQ(rig.uploads(), uploads) << "at visit " << position;
    };
    rig.scheduler->set_schedule(schedule);
    expect_held(0, std::nullopt);
    for (std::size_t i = 0; i < 3 * schedule.size(); ++i) {
      const Visit& visit = schedule[i % schedule.size()];
      rig.acquire(visit.chunk, visit.phase);
      expect_held(i + 1, visit.chunk);
      rig.scheduler->release(visit.chunk, visit.phase, 0);
      expect_held(i + 1, std::nullopt);
    }
    // Two equal visits in a row look like a repeat of the first; else each visit was foreseen, hence in its slot.
    EXPECT_EQ(rig.scheduler->counters().hits, 3 * schedule.size());
  }
}

TEST(SchedulerSchedule, AnUnforeseenVisitTakesTheSlotNeededFurthestAhead) {
  Rig rig(host_device(), equal_chunks(5, 333), {3}, 5);
  rig.scheduler->set_schedule({{0, Phase::forward}, {2, Phase::forward}, {1, Phase::forward}});
  EXPECT_EQ(rig.uploads(), 3u);
  rig.acquire(4, Phase::forward);  // where 1 was
  EXPECT_EQ(rig.uploads(), 4u);
  EXPECT_EQ(rig.scheduler->counters().unscheduled_visits, 1u);
  for (const std::uint32_t chunk : {0, 2}) rig.visit(chunk, Phase::forward);
  EXPECT_EQ(rig.scheduler->counters().hits, 2u);
  EXPECT_EQ(rig.uploads(), 4u + 2u);  // 1 where 0 was, then 0 where 2 was: two slots are left
  rig.scheduler->release(4, Phase::forward, 0);
  rig.visit(1, Phase::forward);
  EXPECT_EQ(rig.scheduler->counters().hits, 3u);
  EXPECT_EQ(rig.scheduler->counters().unscheduled_visits, 1u);
}

TEST(SchedulerSchedule, ANewScheduleStartsAtItsFirstVisit) {
  Rig rig(host_device(), equal_chunks(6, 555), {2}, 6);
  rig.scheduler->set_schedule(training_schedule(6));
  EXPECT_EQ(rig.uploads(), 2u);
  for (std::uint32_t c = 0; c < 4; ++c) rig.visit(c, Phase::forward);
  const std::uint64_t before = rig.uploads();
  rig.scheduler->set_schedule({{1, Phase::forward}, {0, Phase::forward}});
  EXPECT_EQ(rig.uploads(), before + 2);
  const std::uint64_t hits = rig.scheduler->counters().hits;
  for (int i = 0; i < 3; ++i) {
    rig.visit(1, Phase::forward);
    rig.visit(0, Phase::forward);
  }
  EXPECT_EQ(rig.scheduler->counters().hits, hits + 6);
  EXPECT_EQ(rig.uploads(), before + 2);
  rig.scheduler->set_schedule({});
  rig.visit(5, Phase::backward);
  rig.scheduler->set_schedule(training_schedule(6));
  rig.step();
  rig.check_planes();
  expect_error(Code::invalid_argument, {"no chunk 6"}, [&] { rig.scheduler->set_schedule({{6, Phase::forward}}); });
  rig.step();
  rig.check_planes();
}

// An embedding: its backward reads no weights, so no visit stands for it, only its gradient comes.
TEST(SchedulerSchedule, AGradientWithoutAVisitMovesTheSchedule) {
  constexpr std::size_t chunks = 4;
  Rig rig(host_device(), equal_chunks(chunks, 444), {2}, 7);
  std::vector<Visit> schedule = training_schedule(chunks);
  schedule.back().weights = false;
  rig.scheduler->set_schedule(schedule);
  for (int step = 1; step <= 3; ++step) {
    for (std::uint32_t c = 0; c < chunks; ++c) rig.visit(c, Phase::forward);
    for (std::uint32_t c = chunks; c-- > 1;) {
      rig.visit(c, Phase::backward);
      rig.submit(c);
    }
    rig.submit(0);
    // F0 F1 F2 F3 and B1 in each step, and the next one's first two.
    EXPECT_EQ(rig.uploads(), 5u * static_cast<unsigned>(step) + 2);
  }
  EXPECT_EQ(rig.scheduler->counters().hits, rig.scheduler->counters().visits);
  EXPECT_EQ(rig.scheduler->counters().unscheduled_visits, 0u);
  rig.check_planes();
}

TEST(SchedulerSchedule, StoppingEarlyAndEvaluatingBetweenStepsKeepTheWeightsRight) {
  constexpr std::size_t chunks = 5;
  for (std::size_t slots = 1; slots <= 4; ++slots) {
    Rig rig(host_device(), equal_chunks(chunks, 1234), {slots}, 8);
    rig.scheduler->set_schedule(training_schedule(chunks));
    rig.step();
    for (std::uint32_t c = 0; c < 3; ++c) rig.visit(c, Phase::forward);  // an exception in a forward
    rig.step();
    for (std::uint32_t c = 0; c < chunks; ++c) rig.visit(c, Phase::forward);
    for (std::uint32_t c = chunks; c-- > 2;) {  // an exception in a backward, before the last gradient
      rig.visit(c, Phase::backward);
      if (c > 2) rig.submit(c);
    }
    rig.step();
    for (int batch = 0; batch < 3; ++batch) {
      for (std::uint32_t c = 0; c < chunks; ++c) rig.visit(c, Phase::forward);
    }
    rig.step();
    for (int repeat = 0; repeat < 3; ++repeat) rig.visit(2, Phase::forward);
    rig.visit(2, Phase::backward);
    for (int repeat = 0; repeat < 3; ++repeat) rig.visit(2, Phase::backward);
    rig.step();
    rig.check_planes();
  }
}

// Evaluation under the training schedule: the backward visits that are jumped over do not stand in the way.
TEST(SchedulerSchedule, ForwardLoopsBetweenStepsArePrefetched) {
  constexpr std::size_t chunks = 5;
  Rig rig(host_device(), equal_chunks(chunks, 200), {2}, 11);
  rig.scheduler->set_schedule(training_schedule(chunks));
  rig.step();
  for (int batch = 0; batch < 3; ++batch) {
    for (std::uint32_t c = 0; c < chunks; ++c) rig.visit(c, Phase::forward);
  }
  // Of a later batch only the first visit, which the schedule expected to be a backward one, is a miss.
  const Scheduler::Counters counters = rig.scheduler->counters();
  EXPECT_EQ(counters.visits - counters.hits, 2u);
  EXPECT_EQ(counters.unscheduled_visits, 2u);
  rig.step();
  rig.check_planes();
}

TEST(SchedulerSchedule, ANewScheduleForgetsAStepThatWasGivenUp) {
  Rig rig(host_device(), equal_chunks(4, 200), {2}, 12);
  rig.scheduler->set_schedule(training_schedule(4));
  for (std::uint32_t c = 0; c < 4; ++c) rig.visit(c, Phase::forward);
  for (std::uint32_t c = 4; c-- > 0;) rig.visit(c, Phase::backward);  // no gradient comes
  rig.visit(2, Phase::backward);
  rig.visit(3, Phase::backward);
  rig.scheduler->set_schedule(forward_schedule(2));
  const std::uint64_t uploads = rig.uploads(), hits = rig.scheduler->counters().hits;
  for (std::uint32_t c = 0; c < 2; ++c) rig.visit(c, Phase::forward);
  EXPECT_EQ(rig.scheduler->counters().hits, hits + 2);
  EXPECT_EQ(rig.uploads(), uploads);
}

// Any order of calls, nested visits and updates among them: always the right bytes, never an error or a hang.
TEST(SchedulerSchedule, RandomCallsFindTheRightWeights) {
  for (int round = 0; round < 10; ++round) {
    const unsigned seed = new_seed();
    SCOPED_TRACE(seed_text(seed));
    Random random(seed);
    const std::size_t slots = draw<std::size_t>(random, 1, 4);
    const auto chunk_count = draw<std::uint32_t>(random, 1, 8);
    std::vector<ChunkShape> shapes;
    for (std::uint32_t c = 0; c < chunk_count; ++c) shapes.push_back({draw<std::size_t>(random, 1, 20'001)});
    const auto device = host_device();
    const StreamHandle streams[] = {0, device->create_stream(), device->create_stream()};
    {
      Rig rig(device, shapes, {slots}, seed);
      struct Hold {
        std::uint32_t chunk;
        Phase phase;
        StreamHandle stream;
      };
      std::vector<Hold> held;
      const auto any = [&] { return draw<std::uint32_t>(random, 0, chunk_count - 1); };
      for (int call = 0; call < 250; ++call) {
        const unsigned choice = draw<unsigned>(random, 0, 99);
        if (choice < 45) {
          const Hold hold{any(), random() % 2 == 0 ? Phase::forward : Phase::backward, streams[random() % 3]};
          // A submission moves the chunk's next visit to another slot: each hold may need one of its own.
          if (held.size() >= slots) continue;
          rig.acquire(hold.chunk, hold.phase, hold.stream);
          held.push_back(hold);
        } else if (choice < 80) {
          if (held.empty()) continue;
          const Hold hold = held.back();
          held.pop_back();
          rig.scheduler->release(hold.chunk, hold.phase, hold.stream);
        } else if (choice < 92) {
          rig.submit(any(), streams[random() % 3]);
        } else if (choice < 96) {
          rig.scheduler->set_schedule(random() % 3 == 0 ? forward_schedule(chunk_count)
                                                        : training_schedule(chunk_count, random() % 2 == 0));
        } else if (choice < 98) {
          rig.scheduler->wait_updates();
        } else {
          rig.scheduler->synchronize();
        }
      }
      for (; !held.empty(); held.pop_back()) {
        rig.scheduler->release(held.back().chunk, held.back().phase, held.back().stream);
      }
      rig.check_visits();
      rig.check_planes();
      rig.scheduler->set_schedule(training_schedule(chunk_count));
      rig.step(streams[1]);
      rig.check_visits();
      rig.check_planes();
    }
    for (const StreamHandle stream : streams) {
      if (stream != 0) device->destroy_stream(stream);
    }
  }
}

TEST(SchedulerSchedule, AWindowWithoutAFreeSlotIsAnErrorThatPasses) {
  Rig rig(host_device(), {{100, 0}, {100, 0}, {100, 0}, {100, 1}}, {2, 1}, 9);
  rig.scheduler->set_schedule(training_schedule(4));
  rig.acquire(0, Phase::forward);
  rig.acquire(1, Phase::forward);
  for (int i = 0; i < 2; ++i) {
    expect_error(Code::state, {"'chunk 2'", "2 slots"}, [&] { rig.scheduler->acquire(2, Phase::forward, 0); });
  }
  rig.visit(0, Phase::forward);  // shares its slot
  rig.visit(3, Phase::forward);  // another window
  rig.scheduler->check();
  rig.scheduler->release(0, Phase::forward, 0);
  rig.visit(2, Phase::forward);
  rig.scheduler->release(1, Phase::forward, 0);
  for (int step = 0; step < 2; ++step) rig.step();
  rig.check_planes();
}

TEST(SchedulerSchedule, NestedVisitsOfAChunkShareItsSlot) {
  Rig rig(host_device(), equal_chunks(3, 64), {1}, 10);
  const void* outer = rig.acquire(0, Phase::forward);
  EXPECT_EQ(rig.acquire(0, Phase::backward), outer);
  rig.scheduler->release(0, Phase::backward, 0);
  expect_error(Code::state, {"'chunk 1'"}, [&] { rig.scheduler->acquire(1, Phase::forward, 0); });
  rig.scheduler->release(0, Phase::forward, 0);
  rig.visit(1, Phase::forward);
  EXPECT_EQ(rig.uploads(), 2u);
  expect_error(Code::state, {"'chunk 0'", "no visit"}, [&] { rig.scheduler->release(0, Phase::forward, 0); });
  expect_error(Code::invalid_argument, {"no chunk 3"}, [&] { rig.scheduler->release(3, Phase::forward, 0); });
  expect_error(Code::invalid_argument, {"no chunk 3"}, [&] { rig.scheduler->acquire(3, Phase::forward, 0); });
}

// What fell behind in backward is updated in the order in which the next forward needs it.
TEST(SchedulerSchedule, UpdatesGoByTheNeedForTheirWeights) {
  SchedulerOptions options = kSmallPieces;
  options.ring_pieces = 9;
  Rig rig(host_device(), equal_chunks(3, 12'288), {2}, 11, options);
  rig.scheduler->set_schedule(training_schedule(3));
  for (std::uint32_t c = 0; c < 3; ++c) rig.visit(c, Phase::forward);
  Gate gate;
  std::vector<std::uint32_t> consumed, ended;
  rig.sink->set_before([&](const char* call, std::uint32_t chunk) {
    if (call == std::string("consume")) consumed.push_back(chunk);
    if (call == std::string("end")) ended.push_back(chunk);
    gate.pass();
  });
  Ticket landed = 0;
  for (std::uint32_t c = 3; c-- > 0;) {
    rig.visit(c, Phase::backward);
    landed = rig.submit(c);
    if (c == 2) gate.wait_for_arrival();
  }
  rig.scheduler->synchronize_ticket(landed);
  gate.open();
  rig.check_planes();
  // The lane was at the first piece of the gradient that came first.
  EXPECT_EQ(consumed, (std::vector<std::uint32_t>{2, 0, 0, 0, 1, 1, 1, 2, 2}));
  EXPECT_EQ(ended, (std::vector<std::uint32_t>{0, 1, 2}));
}

// A visit that waits for an update comes before all that the schedule expects.
TEST(SchedulerSchedule, TheUpdateThatAVisitWaitsForComesFirst) {
  SchedulerOptions options = kSmallPieces;
  options.ring_pieces = 9;
  Rig rig(host_device(), equal_chunks(3, 12'288), {2}, 12, options);
  rig.scheduler->set_schedule(training_schedule(3));
  for (std::uint32_t c = 0; c < 3; ++c) rig.visit(c, Phase::forward);
  Gate gate;
  std::vector<std::uint32_t> ended;
  rig.sink->set_before([&](const char* call, std::uint32_t chunk) {
    if (call == std::string("end")) ended.push_back(chunk);
    gate.pass();
  });
  Ticket landed = 0;
  for (std::uint32_t c = 3; c-- > 0;) {
    rig.visit(c, Phase::backward);
    landed = rig.submit(c);
    if (c == 2) gate.wait_for_arrival();
  }
  rig.scheduler->synchronize_ticket(landed);
  const std::uint64_t visits = rig.scheduler->counters().visits;
  std::thread visitor([&] { rig.visit(1, Phase::forward); });
  while (rig.scheduler->counters().visits == visits) std::this_thread::yield();
  gate.open();
  visitor.join();
  rig.check_planes();
  EXPECT_EQ(ended, (std::vector<std::uint32_t>{1, 2, 0}));  // after this visit the schedule expects chunk 2
}

}  // namespace
}  // namespace slidecore
