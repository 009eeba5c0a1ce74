// causal_conv1d: y_l = act(bias + sum_k weight[:, width-1-k] x_{prev^k(l)}), prev the walk without its pads.
//
// A row is a token of the flattened (batch, seqlen). x and dy have a row stride, in elements, and dense rows; everything
// else is dense. Optional pointers may be null. `real` is float, or double when dtype is float64.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct CausalConv1dParams {
  DType dtype;  // of x, y, the states and their gradients
  bool silu, reverse;
  int threads;
  std::int64_t batch, seqlen, dim, width, nseq;

  const void* x;              // (batch, seqlen, dim)
  const void* weight;         // (dim, width)             real
  const void* bias;           // (dim,)                   real
  const void* initial_state;  // (nseq, width - 1, dim)   oldest token first
  const std::int32_t* order;       // (seqlen,)
  const std::uint8_t* flags;       // (batch, seqlen)     bit 0 restart, bit 1 pad
  const std::int64_t* cu_seqlens;  // (nseq + 1,)
  std::int64_t x_stride;
};

struct CausalConv1dForward : CausalConv1dParams {
  void* y;            // (batch, seqlen, dim)
  void* final_state;  // (nseq, width - 1, dim)
};

struct CausalConv1dBackward : CausalConv1dParams {
  const void* dy;            // (batch, seqlen, dim)
  const void* dfinal_state;  // (nseq, width - 1, dim)
  std::int64_t dy_stride;
  void* dx;              // (batch, seqlen, dim)
  void* dweight;         // (dim, width)            real
  void* dbias;           // (dim,)                  real; null where bias is
  void* dinitial_state;  // (nseq, width - 1, dim)  null where initial_state is
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, causal_conv1d_forward, (const CausalConv1dForward&))
SSMKIT_CPU_ENTRY(void, causal_conv1d_backward, (const CausalConv1dBackward&))
