// selective_scan: h = exp(dt A) h + dt B x,  y = C.h + D x,  y *= silu(z).
//
// A row is a token of the flattened (batch, seqlen); per-token tensors have one row stride, in elements, and dense rows.
// Optional pointers may be null. `real` is float, or double when dtype is float64; `state` is that, or its complex type.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct SelectiveScanParams {
  DType dtype;            // of x, dt, z, y and (A real) of per-token B and C
  bool complex_state;     // A, B, C and the states are complex
  bool dt_softplus;
  bool reverse;
  int threads;
  std::int64_t batch, seqlen, dim, dstate, nseq;
  std::int64_t B_groups, C_groups;  // 0: constant (dim, dstate)
  std::int64_t dt_rank = 0;  // not 0: dt comes as (batch, seqlen, dt_rank), which dt_weight expands; states real

  const void* x;    // (batch, seqlen, dim)
  const void* dt;   // (batch, seqlen, dim)
  const void* z;    // (batch, seqlen, dim)
  const void* A;    // (dim, dstate)                      state
  const void* B;    // (batch, seqlen, B_groups, dstate)  or (dim, dstate), state
  const void* C;    // (batch, seqlen, C_groups, dstate)  or (dim, dstate), state
  const void* D;        // (dim,)                         real
  const void* dt_bias;  // (dim,)                         real
  const void* dt_weight = nullptr;  // (dim, dt_rank)     real
  const void* initial_state;       // (nseq, dim, dstate) state
  const std::int32_t* order;       // (seqlen,)
  const std::uint8_t* flags;       // (batch, seqlen)     bit 0 restart, bit 1 pad
  const std::int64_t* cu_seqlens;  // (nseq + 1,)
  std::int64_t x_stride, dt_stride, z_stride, B_stride, C_stride;
};

// What an output is added up in over several scans of the same tokens, in `real`, dense rows of dim. Not for complex
// states, nor are rows of outputs with a stride.
struct RunningSum {
  const void* before = nullptr;  // what the scans so far came to; null: this is the first
  void* after = nullptr;         // takes the sum in the place of the output; null: the output takes it
};

struct SelectiveScanForward : SelectiveScanParams {
  void* y;            // (batch, seqlen, dim)
  std::int64_t y_stride;
  RunningSum y_sum;
  void* final_state;  // (nseq, dim, dstate)   state
  void* checkpoints;  // (slots, dstate, dim)  state; null: not kept
};

// Gradients have the layout of what they belong to; those of parameters are dense, `real` or `state`.
struct SelectiveScanBackward : SelectiveScanParams {
  const void* checkpoints;   // (slots, dstate, dim)
  const void* dy;            // (batch, seqlen, dim)
  const void* dfinal_state;  // (nseq, dim, dstate)
  std::int64_t dy_stride, ddt_stride, dB_stride, dC_stride;  // dx and dz: dense
  RunningSum dx_sum, dz_sum;
  void *dx, *ddt, *dz;                    // dz null where z is
  void *dA, *dB, *dC, *dD, *ddt_bias;     // dD, ddt_bias null where D, dt_bias are
  void* ddt_weight = nullptr;             // null where dt_weight is
  void* dinitial_state;                   // null where initial_state is
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, selective_scan_forward, (const SelectiveScanForward&))
SSMKIT_CPU_ENTRY(void, selective_scan_backward, (const SelectiveScanBackward&))
