#include "cpu/linear_scan.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/linear_scan.py lists them.
void set_inputs(ssmkit::LinearScanParams& p, const Sizes<4>& modes, const Sizes<4>& sizes, const Addresses<4>& inputs,
                std::int64_t a_stride) {
  const auto [dtype, constant_a, reverse, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.constant_a = constant_a != 0;
  p.reverse = reverse != 0;
  p.threads = static_cast<int>(threads);

  const auto [batch, seqlen, dim, nseq] = sizes;
  p.batch = batch, p.seqlen = seqlen, p.dim = dim, p.nseq = nseq;

  const auto [a, initial_state, flags, cu_seqlens] = inputs;
  using ssmkit::pointer;
  p.a = pointer<void>(a);
  p.initial_state = pointer<void>(initial_state);
  p.flags = pointer<std::uint8_t>(flags);
  p.cu_seqlens = pointer<std::int64_t>(cu_seqlens);
  p.a_stride = a_stride;
}

void forward(const Sizes<4>& modes, const Sizes<4>& sizes, const Addresses<4>& inputs, const Sizes<2>& strides,
             std::uintptr_t b, const Addresses<3>& outputs) {
  ssmkit::LinearScanForward p;
  set_inputs(p, modes, sizes, inputs, strides[0]);
  using ssmkit::pointer;
  p.b = pointer<void>(b);
  p.b_stride = strides[1];
  const auto [h, states, final_state] = outputs;
  p.h = pointer<void>(h), p.states = pointer<void>(states), p.final_state = pointer<void>(final_state);
  SSMKIT_CPU(linear_scan_forward)(p);
}

void backward(const Sizes<4>& modes, const Sizes<4>& sizes, const Addresses<4>& inputs, const Sizes<2>& strides,
              const Addresses<3>& cotangents, const Addresses<3>& gradients) {
  ssmkit::LinearScanBackward p;
  set_inputs(p, modes, sizes, inputs, strides[0]);
  using ssmkit::pointer;
  const auto [dh, dfinal_state, states] = cotangents;
  p.dh = pointer<void>(dh), p.dfinal_state = pointer<void>(dfinal_state), p.states = pointer<void>(states);
  p.dh_stride = strides[1];
  const auto [da, db, dinitial_state] = gradients;
  p.da = pointer<void>(da), p.db = pointer<void>(db), p.dinitial_state = pointer<void>(dinitial_state);
  SSMKIT_CPU(linear_scan_backward)(p);
}

const ssmkit::Registration kLinearScan([](py::module_& m) {
  m.def("linear_scan_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("linear_scan_backward", &backward, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
