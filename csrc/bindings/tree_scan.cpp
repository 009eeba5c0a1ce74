#include "cpu/tree_scan.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/tree_scan.py lists them.
void set_inputs(ssmkit::TreeScanParams& p, const Sizes<3>& modes, const Sizes<3>& sizes, const Addresses<3>& inputs,
                const Sizes<3>& strides) {
  const auto [dtype, both, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.both = both != 0;
  p.threads = static_cast<int>(threads);
  const auto [batch, seqlen, dim] = sizes;
  p.batch = batch, p.seqlen = seqlen, p.dim = dim;

  const auto [a, order, parent] = inputs;
  using ssmkit::pointer;
  p.a = pointer<void>(a), p.order = pointer<std::int32_t>(order), p.parent = pointer<std::int32_t>(parent);
  p.a_stride = strides[0], p.tree_stride = strides[2];
}

void forward(const Sizes<3>& modes, const Sizes<3>& sizes, const Addresses<3>& inputs, const Sizes<3>& strides,
             std::uintptr_t b, const Addresses<2>& outputs) {
  ssmkit::TreeScanForward p;
  set_inputs(p, modes, sizes, inputs, strides);
  using ssmkit::pointer;
  p.b = pointer<void>(b), p.b_stride = strides[1];
  const auto [h, xi] = outputs;
  p.h = pointer<void>(h), p.xi = pointer<void>(xi);
  SSMKIT_CPU(tree_scan_forward)(p);
}

void backward(const Sizes<3>& modes, const Sizes<3>& sizes, const Addresses<3>& inputs, const Sizes<3>& strides,
              const Addresses<2>& kept, const Addresses<2>& gradients) {
  ssmkit::TreeScanBackward p;
  set_inputs(p, modes, sizes, inputs, strides);
  using ssmkit::pointer;
  const auto [dh, xi] = kept;
  p.dh = pointer<void>(dh), p.xi = pointer<void>(xi), p.dh_stride = strides[1];
  const auto [da, db] = gradients;
  p.da = pointer<void>(da), p.db = pointer<void>(db);
  SSMKIT_CPU(tree_scan_backward)(p);
}

const ssmkit::Registration kTreeScan([](py::module_& m) {
  m.def("tree_scan_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("tree_scan_backward", &backward, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
