#pragma once
// The numbers of a run, and how they are printed.

#include <string>

#include "arguments.h"
#include "workload.h"

struct LaneReport {
  const char* name;
  double bytes;    // of one step; 0 for compute
  double alone_s;  // the lane's work of one step, measured alone
  double busy_s;   // the same work while all lanes run
};

struct Report {
  Arguments arguments;
  std::string device;
  LaneReport lanes[4];  // compute, upload, download, update
  double step_s;        // together
  double hidden;        // see make_report()
  double overlapped;
  double exposed_wait_s;
  double uploads, hits, visits;  // of one step
};

Report make_report(const Arguments& arguments, const Workload& workload, const AloneRates& alone,
                   const Together& together);
std::string as_text(const Report& report);
std::string as_json(const Report& report);
