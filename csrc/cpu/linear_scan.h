// linear_scan: h_l = a_l h_{l-1} + b_l, real or complex.
//
// A row is a token of the flattened (batch, seqlen); per-token inputs have one row stride, in elements, and dense rows.
// Optional pointers may be null. `state` is float, double for float64, or the complex dtype itself.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct LinearScanParams {
  DType dtype;      // of b, h and their gradients, and of a per token
  bool constant_a;  // one row of a serves all tokens
  bool reverse;
  int threads;
  std::int64_t batch, seqlen, dim, nseq;

  const void* a;                   // (batch, seqlen, dim), or (dim,) state
  const void* initial_state;       // (nseq, dim)      state
  const std::uint8_t* flags;       // (batch, seqlen)  bit 0 restart, bit 1 pad
  const std::int64_t* cu_seqlens;  // (nseq + 1,)
  std::int64_t a_stride;
};

struct LinearScanForward : LinearScanParams {
  const void* b;  // (batch, seqlen, dim)
  std::int64_t b_stride;
  void* h;            // (batch, seqlen, dim)
  void* states;       // (batch, seqlen, dim)  state: h unrounded; null: not wanted
  void* final_state;  // (nseq, dim)           state
};

struct LinearScanBackward : LinearScanParams {
  const void* dh;            // (batch, seqlen, dim)
  const void* dfinal_state;  // (nseq, dim)           state
  const void* states;        // (batch, seqlen, dim)  h; with constant_a in state
  std::int64_t dh_stride;
  void* da;              // (batch, seqlen, dim), or (dim,) state
  void* db;              // (batch, seqlen, dim)
  void* dinitial_state;  // (nseq, dim) state; null where initial_state is
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, linear_scan_forward, (const LinearScanForward&))
SSMKIT_CPU_ENTRY(void, linear_scan_backward, (const LinearScanBackward&))
