// ssd: h = exp(dt A) h + dt x B^T,  y = h C + D x,  y *= silu(z); one decay per head.
//
// A row is a token of the flattened (batch, seqlen); per-token tensors have one row stride, in elements, and dense rows.
// Optional pointers may be null. `real` is float, or double when dtype is float64.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct SsdParams {
  DType dtype;  // of x, dt, B, C, z and, unless `wide`, of y and the gradients per token
  bool dt_softplus, reverse;
  bool wide;    // y, or the gradients per token, in `real`
  int threads, chunk;
  std::int64_t batch, seqlen, nheads, headdim, ngroups, dstate, nseq;
  double dt_min, dt_max;

  const void* x;   // (batch, seqlen, nheads, headdim)
  const void* dt;  // (batch, seqlen, nheads)
  const void* B;   // (batch, seqlen, ngroups, dstate)
  const void* C;   // (batch, seqlen, ngroups, dstate)
  const void* z;   // (batch, seqlen, nheads, headdim)
  const void* A;        // (nheads,)                               real
  const void* D;        // (nheads, headdim)                       real
  const void* dt_bias;  // (nheads,)                               real
  const void* initial_state;       // (nseq, nheads, headdim, dstate)  real
  const std::uint8_t* flags;       // (batch, seqlen)                  bit 0 restart, bit 1 pad
  const std::int64_t* cu_seqlens;  // (nseq + 1,)
  std::int64_t x_stride, dt_stride, B_stride, C_stride, z_stride;
};

struct SsdForward : SsdParams {
  const void* addend;  // (batch, seqlen, nheads, headdim)         real; added before the gate
  void* y;             // (batch, seqlen, nheads, headdim)
  void* final_state;   // (nseq, nheads, headdim, dstate)          real
  void* checkpoints;   // (slots, nheads, dstate, headdim)         real; the state before each chunk; null: not kept
  void* ungated;       // (batch, seqlen, nheads, headdim)         real; y before the gate; null: not kept
};

// Gradients have the layout of what they belong to, dense; those of parameters are `real`.
struct SsdBackward : SsdParams {
  const void* dy;            // (batch, seqlen, nheads, headdim)
  const void* dfinal_state;  // (nseq, nheads, headdim, dstate)    real
  const void* checkpoints;
  const void* ungated;
  std::int64_t dy_stride;
  void *dx, *ddt, *dB, *dC;
  void* dz;                        // null: not wanted
  void *dA, *dD, *ddt_bias;        // dD, ddt_bias null where D, dt_bias are
  void* dinitial_state;            // null where initial_state is
};

}  // namespace ssmkit

SSMKIT_CPU_BF16_ENTRY(void, ssd_forward, (const SsdForward&))
SSMKIT_CPU_BF16_ENTRY(void, ssd_backward, (const SsdBackward&))
