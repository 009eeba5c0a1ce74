// linear_step: y = x weight^T + bias for few rows of x; what it costs is reading the weight once.
//
// Rows of x and of the weight are dense and have a row stride, in elements; the bias may be null.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct LinearStepParams {
  DType dtype;  // of all tensors; sums are kept in float, or in double for float64
  int threads;
  std::int64_t batch, in_features, out_features;

  const void* x;       // (batch, in_features)
  const void* weight;  // (out_features, in_features)
  const void* bias;    // (out_features,)
  void* y;             // (batch, out_features)  dense
  std::int64_t x_stride, weight_stride;
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, linear_step, (const LinearStepParams&))
