// rms_norm: y = v / sqrt(mean(v^2) + eps) * weight + bias over groups of channels, with residual add and gate.
//
// Inputs are rows of `dim` dense channels with a row stride, in elements. Optional pointers may be null. `acc` is float,
// or double for float64.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct RmsNormParams {
  DType dtype;        // of x, y, z, dy, dz
  DType total_dtype;  // of the sum and its gradient
  bool gate_after;    // the gate acts on the normalised values
  int threads;
  std::int64_t rows, dim, group;

  const void* weight;  // (dim,)        acc
  const void* bias;    // (dim,)        acc
  const void* z;       // (rows, dim)
  std::int64_t z_stride;
};

struct RmsNormForward : RmsNormParams {
  double eps;
  DType residual_dtype;
  const void* x;         // (rows, dim)
  const void* residual;  // (rows, dim)
  std::int64_t x_stride, residual_stride;
  void* y;      // (rows, dim)
  void* total;  // (rows, dim)          x + residual; null where there is no residual
  void* rstd;   // (rows, dim / group)  acc
};

struct RmsNormBackward : RmsNormParams {
  const void* dy;      // (rows, dim)
  const void* dtotal;  // (rows, dim)          total_dtype
  const void* total;   // (rows, dim)          total_dtype
  const void* rest;    // (rows, dim)          total_dtype  added to total, where it holds the other summand only
  const void* rstd;    // (rows, dim / group)  acc
  std::int64_t dy_stride, dtotal_stride, total_stride, rest_stride;
  void* dx;       // (rows, dim)          total_dtype
  void* dz;       // (rows, dim)
  void* dweight;  // (dim,)               acc
  void* dbias;    // (dim,)               acc
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, rms_norm_forward, (const RmsNormForward&))
SSMKIT_CPU_ENTRY(void, rms_norm_backward, (const RmsNormBackward&))
