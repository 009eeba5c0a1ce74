// ssd_step: one token of state-space duality, the state updated in place.
//
// Optional pointers may be null. Rows have a stride, in elements, and are dense. `acc` is float, or double for float64.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct SsdStepParams {
  DType dtype;        // of x, dt, z, B, C, y
  DType state_dtype;  // of state
  bool softplus;
  int threads;
  std::int64_t batch, nheads, headdim, ngroups, dstate;
  double dt_min, dt_max;

  void* state;      // (slots, nheads, headdim, dstate)
  const void* x;    // (batch, nheads, headdim)
  const void* dt;   // (batch, nheads)
  const void* z;    // (batch, nheads, headdim)
  const void* B;    // (batch, ngroups, dstate)
  const void* C;    // (batch, ngroups, dstate)
  const void* A;        // (nheads,)          acc
  const void* D;        // (nheads, headdim)  acc; or, with D_per_head, (nheads,)
  const void* dt_bias;  // (nheads,)          acc
  const std::int64_t* slots;  // (batch,)  negative: nothing is done; null: slot b for row b
  std::int64_t x_stride, dt_stride, z_stride, B_stride, C_stride, D_stride;
  bool D_per_head;
  void* y;  // (batch, nheads, headdim)
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, ssd_step, (const SsdStepParams&))
