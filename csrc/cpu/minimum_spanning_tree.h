// minimum_spanning_tree: of a graph over the tokens, for each row of weights; its breadth-first walk from a root.
//
// Between equal weights the earlier edge counts as less; a NaN is greater than any number; -0 and 0 are equal.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit {

struct MinimumSpanningTreeParams {
  DType dtype;  // of the weights: float32 or float64
  int threads;
  std::int64_t batch, nedges, seqlen, root;

  const void* weights;        // (batch, nedges)
  const std::int32_t* edges;  // (nedges, 2)      tokens within 0..seqlen - 1
  std::int32_t* order;        // (batch, seqlen)  the token at each position
  std::int32_t* parent;       // (batch, seqlen)  the position of its parent; of the root, 0
};

}  // namespace ssmkit

// Into how many parts the edges leave the tokens; more than one, and the tables are not written.
SSMKIT_CPU_ENTRY(std::int64_t, minimum_spanning_tree, (const MinimumSpanningTreeParams&))
