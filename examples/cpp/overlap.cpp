// How well copies, computation and updates overlap on this machine: slidecore's scheduler, used without Python.
//
// workload.cpp shows the use of the scheduler: planes and slots, the schedule, and a visit (Workload::visit).

#include <slidecore/status.h>

#include <cstdio>

#include "arguments.h"
#include "report.h"
#include "workload.h"

int main(int argc, char** argv) {
  Arguments arguments;
  try {
    arguments = parse_arguments(argc, argv);
  } catch (const BadArgument& error) {
    std::fprintf(stderr, "overlap: %s\nTry --help.\n", error.what());
    return 2;
  }
  if (arguments.help) {
    std::fputs(kUsage, stdout);
    return 0;
  }

  try {
    Workload workload(arguments);
    const AloneRates alone = workload.measure_alone();
    const Together together = workload.measure_together();
    if (const std::string wrong = workload.verify(); !wrong.empty()) {
      std::fprintf(stderr, "overlap: wrong result: %s\n", wrong.c_str());
      return 1;
    }
    const Report report = make_report(arguments, workload, alone, together);
    std::fputs((arguments.json ? as_json(report) : as_text(report)).c_str(), stdout);
  } catch (const slidecore::Error& error) {
    std::fprintf(stderr, "overlap: %s\n", error.what());
    return error.code() == slidecore::Code::unsupported || error.code() == slidecore::Code::out_of_memory ? 3 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "overlap: %s\n", error.what());
    return 1;
  }
  return 0;
}
