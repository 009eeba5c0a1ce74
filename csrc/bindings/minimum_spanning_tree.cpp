#include "cpu/minimum_spanning_tree.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/minimum_spanning_tree.py lists them.
std::int64_t span(const Sizes<2>& modes, const Sizes<4>& sizes, const Addresses<2>& graph, const Addresses<2>& tables) {
  ssmkit::MinimumSpanningTreeParams p;
  using ssmkit::pointer;
  p.dtype = static_cast<ssmkit::DType>(modes[0]), p.threads = static_cast<int>(modes[1]);
  const auto [batch, nedges, seqlen, root] = sizes;
  p.batch = batch, p.nedges = nedges, p.seqlen = seqlen, p.root = root;
  p.weights = pointer<void>(graph[0]), p.edges = pointer<std::int32_t>(graph[1]);
  p.order = pointer<std::int32_t>(tables[0]), p.parent = pointer<std::int32_t>(tables[1]);
  return SSMKIT_CPU(minimum_spanning_tree)(p);
}

const ssmkit::Registration kMinimumSpanningTree([](py::module_& m) {
  m.def("minimum_spanning_tree", &span, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
