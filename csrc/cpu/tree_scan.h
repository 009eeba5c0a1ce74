// tree_scan: xi_v = b_v + sum of a_c xi_c over the children c, then h_v = xi_v + a_v (h_parent - a_v xi_v).
//
// A row is a token of the flattened (batch, seqlen); per-token inputs have one row stride, in elements, and dense rows.
// A position is a place in a breadth-first walk of a tree. `state` is float, or double for float64.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct TreeScanParams {
  DType dtype;  // of a, b, h and their gradients
  bool both;    // both sweeps, or the one from the leaves to the root alone
  int threads;
  std::int64_t batch, seqlen, dim;

  const void* a;               // (batch, seqlen, dim)
  const std::int32_t* order;   // (batch, seqlen)  the token at each position
  const std::int32_t* parent;  // (batch, seqlen)  the position of its parent, never descending; of the root, 0
  std::int64_t a_stride;
  std::int64_t tree_stride;  // from one tree to the next; 0: one tree for the whole batch
};

struct TreeScanForward : TreeScanParams {
  const void* b;  // (batch, seqlen, dim)
  std::int64_t b_stride;
  void* h;   // (batch, seqlen, dim)
  void* xi;  // (batch, seqlen, dim)  state, by position; null: not wanted
};

struct TreeScanBackward : TreeScanParams {
  const void* dh;  // (batch, seqlen, dim)
  std::int64_t dh_stride;
  const void* xi;  // (batch, seqlen, dim)  state, by position
  void* da;        // (batch, seqlen, dim)
  void* db;        // (batch, seqlen, dim)
};

}  // namespace ssmkit

SSMKIT_CPU_ENTRY(void, tree_scan_forward, (const TreeScanForward&))
SSMKIT_CPU_ENTRY(void, tree_scan_backward, (const TreeScanBackward&))
