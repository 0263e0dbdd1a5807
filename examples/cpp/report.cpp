#include "report.h"

#include <algorithm>
#include <cstdio>

using slidecore::Lane;

namespace {

template <class... Values>
std::string format(const char* pattern, Values... values) {
  char line[512];
  std::snprintf(line, sizeof line, pattern, values...);
  return line;
}

double gigabytes_per_second(double bytes, double seconds) {
  return seconds > 0 ? bytes / seconds / 1e9 : 0;
}

std::string rate(double bytes, double seconds) {
  return bytes > 0 ? format("%.2f", gigabytes_per_second(bytes, seconds)) : "-";
}

// Device names come from drivers: quotes, backslashes and control characters may not break the JSON.
std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return result + '"';
}

// Of work that takes `sum` seconds one after the other and whose longest part takes `longest`, the share of all but
// the longest that a step of `step` seconds did not have to wait for: 0 if nothing ran at the same time, 1 if all did.
double saved_share(double sum, double longest, double step) {
  return sum > longest ? std::clamp((sum - step) / (sum - longest), 0.0, 1.0) : 1.0;
}

}  // namespace

// Two answers to "how much of the shorter work was hidden behind the longest lane's":
//   hidden      counts the lanes' times alone: what a user gains. Lanes that slow each other down (shared memory
//               bandwidth, too few cores) lower it.
//   overlapped  counts the lanes' times as they were together: what the scheduler achieved.
Report make_report(const Arguments& arguments, const Workload& workload, const AloneRates& alone,
                   const Together& together) {
  const double steps = static_cast<double>(arguments.steps);
  const double chunk = static_cast<double>(workload.chunk_bytes());
  const double uploaded = static_cast<double>(together.counters.upload_bytes) / steps;
  const double downloaded = static_cast<double>(together.counters.gradient_bytes) / steps;
  const auto busy = [&](Lane lane) { return together.trace.lanes[static_cast<int>(lane)].busy_s / steps; };

  Report report{};
  report.arguments = arguments;
  report.device = workload.device_name();
  report.visits = static_cast<double>(together.counters.visits) / steps;
  report.lanes[0] = {"compute", 0, report.visits * alone.compute, together.compute_s / steps};
  report.lanes[1] = {"upload", uploaded, uploaded / chunk * alone.upload, busy(Lane::upload)};
  report.lanes[2] = {"download", downloaded, downloaded / chunk * alone.download, busy(Lane::download)};
  report.lanes[3] = {"update", downloaded, downloaded / chunk * alone.update, busy(Lane::update)};
  report.step_s = together.seconds / steps;
  double alone_sum = 0, alone_longest = 0, busy_sum = 0, busy_longest = 0;
  for (const LaneReport& lane : report.lanes) {
    alone_sum += lane.alone_s;
    alone_longest = std::max(alone_longest, lane.alone_s);
    busy_sum += lane.busy_s;
    busy_longest = std::max(busy_longest, lane.busy_s);
  }
  report.hidden = saved_share(alone_sum, alone_longest, report.step_s);
  report.overlapped = saved_share(busy_sum, busy_longest, report.step_s);
  report.exposed_wait_s = together.trace.exposed_wait_s / steps;
  report.uploads = static_cast<double>(together.counters.uploads) / steps;
  report.hits = static_cast<double>(together.counters.hits) / steps;
  return report;
}

std::string as_text(const Report& report) {
  const Arguments& a = report.arguments;
  std::string text =
      format("%s (%s): %zu chunks of %zu MiB through a window of %zu, %zu steps; times are of one step\n\n",
             a.backend.c_str(), report.device.c_str(), a.chunks, a.chunk_mib, a.window, a.steps);
  text += format("%-10s %12s %10s %12s %10s %10s\n", "lane", "alone", "GB/s", "together", "GB/s", "busy");
  for (const LaneReport& lane : report.lanes) {
    text += format("%-10s %9.2f ms %10s %9.2f ms %10s %8.0f %%\n", lane.name, lane.alone_s * 1e3,
                   rate(lane.bytes, lane.alone_s).c_str(), lane.busy_s * 1e3, rate(lane.bytes, lane.busy_s).c_str(),
                   lane.busy_s / report.step_s * 100);
  }
  text += format("%-10s %12s %10s %9.2f ms\n", "step", "", "", report.step_s * 1e3);
  text += format("\nhidden:     %3.0f %% of the work beside the longest lane's cost no time\n", report.hidden * 100);
  text += format("overlapped: %3.0f %% of it ran while other lanes were busy, at the speed it then had\n",
                 report.overlapped * 100);
  text += format("%.1f uploads for %.0f visits, %.1f of which were served from the schedule; compute waited %.2f ms\n",
                 report.uploads, report.visits, report.hits, report.exposed_wait_s * 1e3);
  return text + "every visit saw, and every plane has, the values of its updates\n";
}

std::string as_json(const Report& report) {
  const Arguments& a = report.arguments;
  std::string text = "{\"backend\": " + quoted(a.backend) + ", \"device\": " + quoted(report.device);
  text += format(", \"chunks\": %zu, \"chunk_bytes\": %zu, \"window\": %zu, \"steps\": %zu", a.chunks,
                 a.chunk_mib << 20, a.window, a.steps);
  text += ", \"lanes\": {";
  for (const LaneReport& lane : report.lanes) {
    text += format("%s\"%s\": {\"bytes\": %.0f, \"alone_s\": %.9g, \"together_s\": %.9g, ",
                   &lane == report.lanes ? "" : ", ", lane.name, lane.bytes, lane.alone_s, lane.busy_s);
    text += format("\"alone_gb_s\": %.6g, \"together_gb_s\": %.6g, \"busy_share\": %.6g}",
                   gigabytes_per_second(lane.bytes, lane.alone_s), gigabytes_per_second(lane.bytes, lane.busy_s),
                   lane.busy_s / report.step_s);
  }
  text += format("}, \"step_s\": %.9g, \"hidden\": %.6g, \"overlapped\": %.6g, \"exposed_wait_s\": %.9g, ",
                 report.step_s, report.hidden, report.overlapped, report.exposed_wait_s);
  text += format("\"uploads\": %.6g, \"hits\": %.6g, \"visits\": %.6g, ", report.uploads, report.hits, report.visits);
  return text + "\"verified\": true}\n";
}
