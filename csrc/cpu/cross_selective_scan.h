// cross_selective_scan: selective scans of the same tokens along several paths, each with parameters of its own; their
// outputs added up, or kept apart.
//
// Rows, strides and dtypes as in selective_scan.h, states real. What each path has of its own lies `path` elements behind
// that of the path before it, in every row: dt, B and C may be views of one projection.
#pragma once

#include "cpu/selective_scan.h"

namespace ssmkit {

struct ScanPathTables {
  const std::int32_t* order;  // (seqlen,)        or null
  const std::uint8_t* flags;  // (batch, seqlen)  or null
  bool reverse;
};

struct CrossSelectiveScanParams {
  DType dtype;
  bool dt_softplus;
  bool merged;  // y is the sum over the paths
  int threads;
  std::int64_t batch, seqlen, dim, dstate, npaths, B_groups, C_groups;  // groups of one path, at least 1
  std::int64_t dt_rank = 0;  // as in selective_scan.h

  const void* x;   // (batch, seqlen, dim)
  const void* dt;  // (batch, seqlen, npaths, dim, or dt_rank if not 0)
  const void* z;   // (batch, seqlen, dim)
  const void* A;   // (npaths, dim, dstate)                      real
  const void* B;   // (batch, seqlen, npaths, B_groups, dstate)
  const void* C;   // (batch, seqlen, npaths, C_groups, dstate)
  const void* D;        // (npaths, dim)  real
  const void* dt_bias;  // (npaths, dim)  real
  const void* dt_weight = nullptr;  // (npaths, dim, dt_rank)  real
  const ScanPathTables* paths;  // (npaths,)
  std::int64_t x_stride, dt_stride, z_stride, B_stride, C_stride;  // from token to token
  std::int64_t dt_path, B_path, C_path;                            // from path to path
};

struct CrossSelectiveScanForward : CrossSelectiveScanParams {
  void* y;            // (batch, seqlen, dim), or not merged (batch, seqlen, npaths, dim)
  void* checkpoints;  // (npaths, slots, dstate, dim)  real; null: not kept
};

// Gradients have the layout of what they belong to, dense; those of parameters are `real`.
struct CrossSelectiveScanBackward : CrossSelectiveScanParams {
  const void* checkpoints;  // (npaths, slots, dstate, dim)
  const void* dy;           // like y
  std::int64_t dy_stride, dy_path;
  void *dx, *ddt, *dz;                 // dz null where z is
  void *dA, *dB, *dC, *dD, *ddt_bias;  // dD, ddt_bias null where D, dt_bias are
  void* ddt_weight = nullptr;          // null where dt_weight is
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, cross_selective_scan_forward, (const CrossSelectiveScanForward&))
SSMKIT_CPU_ENTRY(void, cross_selective_scan_backward, (const CrossSelectiveScanBackward&))
