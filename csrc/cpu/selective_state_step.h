// selective_state_step: one token of the selective scan, the state updated in place.
//
// Optional pointers may be null. Rows have a stride, in elements, and dense channels. `acc` is float, or double for
// float64.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct SelectiveStateStepParams {
  DType dtype;        // of x, dt, z, B, C, y
  DType state_dtype;  // of state
  bool softplus;
  int threads;
  std::int64_t batch, dim, dstate, groups_B, groups_C;

  void* state;      // (slots, dim, dstate)
  const void* x;    // (batch, dim)
  const void* dt;   // (batch, dim)
  const void* z;    // (batch, dim)
  const void* B;    // (batch, groups_B, dstate)
  const void* C;    // (batch, groups_C, dstate)
  const void* A;        // (dim, dstate)  acc
  const void* D;        // (dim,)         acc
  const void* dt_bias;  // (dim,)         acc
  const std::int64_t* slots;  // (batch,)  negative: nothing is done; null: slot b for row b
  std::int64_t x_stride, dt_stride, z_stride, B_stride, C_stride;
  void* y;  // (batch, dim)
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, selective_state_step, (const SelectiveStateStepParams&))
