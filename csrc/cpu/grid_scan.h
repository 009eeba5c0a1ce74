// grid_scan: a cell of an image takes its state from the one above it and the one to its left,
//
//     h_ij = w (a_top h_{i-1,j} + b_top + a_left h_{i,j-1} + b_left),   w = 1/2,   a = exp(dt A), b = dt B x
//
// and y = C.h + D x, y *= silu(z). The first row has no term from the top, the first column none from the left but for
// the first cell; there w = 1. "Top" and "left" are those of an observer who starts in the corner where the scan does.
//
// A row of memory is a token of the flattened (batch, height, width); per-token tensors have one row stride, in elements,
// and dense rows. Optional pointers may be null. `real` is float, or double when dtype is float64.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

enum Side : int { kTop, kLeft };
constexpr Side kSides[] = {kTop, kLeft};

struct GridScanParams {
  DType dtype;  // of per-token tensors
  bool dt_softplus;
  bool from_bottom, from_right;
  int threads;
  std::int64_t batch, height, width, dim, dstate;

  const void* x;           // (batch, height, width, dim)
  const void* z;           // (batch, height, width, dim)
  const void* dt[2];       // (batch, height, width, dim)      by Side
  const void* A[2];        // (dim, dstate)                    real
  const void* B[2];        // (batch, height, width, dstate)
  const void* C;           // (batch, height, width, dstate)
  const void* D;           // (dim,)                           real
  const void* dt_bias[2];  // (dim,)                           real
  std::int64_t x_stride, z_stride, dt_stride[2], B_stride[2], C_stride;
};

struct GridScanForward : GridScanParams {
  void* y;            // (batch, height, width, dim)
  void* checkpoints;  // (slots, dstate, dim)  real; null: not kept. The slots are those of Borders in grid_scan_plan.h.
};

// Gradients have the layout of what they belong to, dense; those of parameters are `real`.
struct GridScanBackward : GridScanParams {
  const void* checkpoints;  // (slots, dstate, dim)
  const void* dy;           // (batch, height, width, dim)
  std::int64_t dy_stride;
  void *dx, *dz, *ddt[2];                 // dz null where z is
  void *dA[2], *dB[2], *dC, *dD;          // dD null where D is
  void* ddt_bias[2];                      // null where dt_bias is
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, grid_scan_forward, (const GridScanForward&))
SSMKIT_CPU_ENTRY(void, grid_scan_backward, (const GridScanBackward&))
