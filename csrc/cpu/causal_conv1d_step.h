// causal_conv1d_step: the next tokens of a causal convolution, the state updated in place.
//
// Optional pointers may be null. x has strides, in elements, and dense channels; everything else is dense.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct CausalConv1dStepParams {
  DType dtype;         // of x and y
  DType state_dtype;   // of state; float64 where x is
  DType weight_dtype;  // of weight; bias_dtype likewise
  DType bias_dtype;
  bool silu;
  int threads;
  std::int64_t batch, seqlen, dim, width, state_len;

  const void* x;       // (batch, seqlen, dim)
  void* state;         // (slots, state_len, dim)  oldest first, or a ring where `seen` is given
  const void* weight;  // (dim, width)
  const void* bias;    // (dim,)
  const std::int64_t* seen;   // (batch,)  tokens so far: token t is entry t % state_len
  const std::int64_t* slots;  // (batch,)  negative: nothing is done; null: slot b for row b
  void* y;             // (batch, seqlen, dim)
  std::int64_t x_batch_stride, x_stride;
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, causal_conv1d_step, (const CausalConv1dStepParams&))
