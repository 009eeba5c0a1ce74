// ssd_noncausal: S = sum_l w_l x_l B_l^T with w = -dt A,  y_l = S C_l + D x_l; one S per head of every sequence.
//
// A row is a token of the flattened (batch, seqlen); per-token tensors have one row stride, in elements, and dense rows.
// Optional pointers may be null. `real` is float, or double when dtype is float64.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct SsdNoncausalParams {
  DType dtype;  // of x, dt, B, C, y and the gradients per token
  bool dt_softplus;
  bool interleaved;  // head h reads group h % ngroups instead of h / (nheads / ngroups)
  int threads;
  std::int64_t batch, seqlen, nheads, headdim, ngroups, dstate, nseq;

  const void* x;   // (batch, seqlen, nheads, headdim)
  const void* dt;  // (batch, seqlen, nheads)
  const void* B;   // (batch, seqlen, ngroups, dstate)
  const void* C;   // (batch, seqlen, ngroups, dstate)
  const void* A;        // (nheads,)                    real
  const void* D;        // (nheads, headdim)            real
  const void* dt_bias;  // (nheads,)                    real
  const std::uint8_t* flags;       // (batch, seqlen)   bit 1 pad
  const std::int64_t* cu_seqlens;  // (nseq + 1,)
  std::int64_t x_stride, dt_stride, B_stride, C_stride;
};

struct SsdNoncausalForward : SsdNoncausalParams {
  void* y;      // (batch, seqlen, nheads, headdim)
  void* state;  // (nseq, nheads, headdim, dstate)      real
};

// Gradients have the layout of what they belong to, dense; those of parameters are `real`.
struct SsdNoncausalBackward : SsdNoncausalParams {
  const void* dy;      // (batch, seqlen, nheads, headdim)
  const void* dfinal;  // (nseq, nheads, headdim, dstate)  real; may be null
  const void* state;   // (nseq, nheads, headdim, dstate)  real
  std::int64_t dy_stride;
  void *dx, *ddt, *dB, *dC;
  void *dA, *dD, *ddt_bias;  // dD, ddt_bias null where D, dt_bias are
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, ssd_noncausal_forward, (const SsdNoncausalForward&))
SSMKIT_CPU_ENTRY(void, ssd_noncausal_backward, (const SsdNoncausalBackward&))
