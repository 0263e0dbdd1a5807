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

double gigabytes_per_second(double bytes, double seconds) { return seconds > 0 ? bytes / seconds / 1e9 : 0; }

// Device names come from drivers: quotes, backslashes and control characters may not break the JSON.
std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return result + '"';
}

}  // namespace

// Without overlap a step takes the sum of its lanes' times alone; with perfect overlap, the longest of them. `hidden`
// is how far the step got from the one to the other: the share of all work but the longest that cost no time.
Report make_report(const Arguments& arguments, const Workload& workload, const AloneRates& alone,
                   const Together& together) {
  const double steps = static_cast<double>(arguments.steps);
  const double chunk = static_cast<double>(workload.chunk_bytes());
  const double uploaded = static_cast<double>(together.counters.upload_bytes) / steps;
  const double downloaded = static_cast<double>(together.counters.gradient_bytes) / steps;
  const double visits = static_cast<double>(together.counters.visits) / steps;
  const auto busy = [&](Lane lane) { return together.trace.lanes[static_cast<int>(lane)].busy_s / together.seconds; };

  Report report{};
  report.arguments = arguments;
  report.device = workload.device_name();
  report.lanes[0] = {"compute", visits * alone.compute, 0, steps * visits * alone.compute / together.seconds};
  report.lanes[1] = {"upload", uploaded / chunk * alone.upload, uploaded, busy(Lane::upload)};
  report.lanes[2] = {"download", downloaded / chunk * alone.download, downloaded, busy(Lane::download)};
  report.lanes[3] = {"update", downloaded / chunk * alone.update, downloaded, busy(Lane::update)};
  report.step_s = together.seconds / steps;
  for (const LaneReport& lane : report.lanes) {
    report.sum_s += lane.alone_s;
    report.longest_s = std::max(report.longest_s, lane.alone_s);
  }
  report.hidden = std::clamp((report.sum_s - report.step_s) / (report.sum_s - report.longest_s), 0.0, 1.0);
  report.exposed_wait_s = together.trace.exposed_wait_s / steps;
  report.uploads = static_cast<double>(together.counters.uploads) / steps;
  report.hits = static_cast<double>(together.counters.hits) / steps;
  report.visits = visits;
  return report;
}

std::string as_text(const Report& report) {
  const Arguments& a = report.arguments;
  std::string text = format("%s (%s): %zu chunks of %zu MiB through a window of %zu, %zu steps\n\n", a.backend.c_str(),
                            report.device.c_str(), a.chunks, a.chunk_mib, a.window, a.steps);
  text += format("%-10s %12s %12s %14s %11s\n", "lane", "alone", "GB/s alone", "GB/s together", "busy share");
  for (const LaneReport& lane : report.lanes) {
    text += format("%-10s %9.2f ms", lane.name, lane.alone_s * 1e3);
    if (lane.bytes > 0) {
      text += format(" %12.2f %14.2f", gigabytes_per_second(lane.bytes, lane.alone_s),
                     gigabytes_per_second(lane.bytes, report.step_s));
    } else {
      text += format(" %12s %14s", "-", "-");
    }
    text += format(" %9.0f %%\n", lane.busy_share * 100);
  }
  text += format("\none step: %.2f ms; its lanes one after the other: %.2f ms; the longest of them: %.2f ms\n",
                 report.step_s * 1e3, report.sum_s * 1e3, report.longest_s * 1e3);
  text += format("hidden: %.0f %% of the work beside the longest lane's cost no time\n", report.hidden * 100);
  text += format("compute waited %.2f ms for its slots; %.1f of %.0f visits found their chunk still there\n",
                 report.exposed_wait_s * 1e3, report.hits, report.visits);
  return text + "every visit saw, and every plane has, the values of its updates\n";
}

std::string as_json(const Report& report) {
  const Arguments& a = report.arguments;
  std::string text = "{\"backend\": " + quoted(a.backend) + ", \"device\": " + quoted(report.device);
  text += format(", \"chunks\": %zu, \"chunk_bytes\": %zu, \"window\": %zu, \"steps\": %zu", a.chunks, a.chunk_mib << 20,
                 a.window, a.steps);
  text += ", \"lanes\": {";
  for (const LaneReport& lane : report.lanes) {
    text += format("%s\"%s\": {\"alone_s\": %.9g, \"bytes\": %.0f, \"alone_gb_s\": %.6g, \"together_gb_s\": %.6g, ",
                   &lane == report.lanes ? "" : ", ", lane.name, lane.alone_s, lane.bytes,
                   gigabytes_per_second(lane.bytes, lane.alone_s), gigabytes_per_second(lane.bytes, report.step_s));
    text += format("\"busy_share\": %.6g}", lane.busy_share);
  }
  text += format("}, \"step_s\": %.9g, \"sum_s\": %.9g, \"longest_s\": %.9g, \"hidden\": %.6g, ", report.step_s,
                 report.sum_s, report.longest_s, report.hidden);
  text += format("\"exposed_wait_s\": %.9g, \"uploads\": %.6g, \"hits\": %.6g, \"visits\": %.6g, ", report.exposed_wait_s,
                 report.uploads, report.hits, report.visits);
  return text + "\"verified\": true}\n";
}
