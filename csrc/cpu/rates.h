// What this machine does at best with the instructions a scan is made of; benchmarks divide by these.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace ssmkit {
struct RatesParams {
  std::int64_t rounds;  // passes over independent vectors, per thread
  int threads;
};
}  // namespace ssmkit

// Both return the number of elements they computed, all threads together.
SSMKIT_CPU_ENTRY(double, run_exp2, (const RatesParams&))
SSMKIT_CPU_ENTRY(double, run_fma, (const RatesParams&))
