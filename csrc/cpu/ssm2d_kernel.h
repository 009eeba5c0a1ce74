// ssm2d_kernel: states of Roesser's model over an image, from an impulse at the origin.
//
//   h_ij = c_ij (A1 h_{i,j-1} + A2 v_{i,j-1}),  v_ij = c_ij (A3 h_{i-1,j} + A4 v_{i-1,j})
//
// with B1 and B2 at the origin; c is 1 in the first row and the first column and 1/2 in all others. All is dense and of
// one dtype: float, double, or complex. A lane is one state of one group.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct Ssm2dKernelParams {
  DType dtype;
  int threads;
  std::int64_t height, width, lanes;

  const void* A;  // (4, lanes)
};

struct Ssm2dKernelForward : Ssm2dKernelParams {
  const void* B;  // (2, lanes)
  void* h;        // (height, width, lanes)
  void* v;        // (height, width, lanes)
};

struct Ssm2dKernelBackward : Ssm2dKernelParams {
  const void* dh;  // (height, width, lanes)
  const void* dv;  // (height, width, lanes)
  const void* h;   // (height, width, lanes)
  const void* v;   // (height, width, lanes)
  void* dA;        // (4, lanes)
  void* dB;        // (2, lanes)
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, ssm2d_kernel_forward, (const Ssm2dKernelForward&))
SSMKIT_CPU_ENTRY(void, ssm2d_kernel_backward, (const Ssm2dKernelBackward&))
