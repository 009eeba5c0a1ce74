#include "cpu/selective_scan.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/selective_scan.py lists them.
void set_inputs(ssmkit::SelectiveScanParams& p, const Sizes<5>& modes, const Sizes<7>& sizes,
                const Addresses<12>& inputs, const Sizes<5>& strides) {
  const auto [dtype, complex_state, dt_softplus, reverse, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.complex_state = complex_state != 0;
  p.dt_softplus = dt_softplus != 0;
  p.reverse = reverse != 0;
  p.threads = static_cast<int>(threads);

  const auto [batch, seqlen, dim, dstate, nseq, B_groups, C_groups] = sizes;
  p.batch = batch, p.seqlen = seqlen, p.dim = dim, p.dstate = dstate, p.nseq = nseq;
  p.B_groups = B_groups, p.C_groups = C_groups;

  const auto [x, dt, A, B, C, D, z, dt_bias, initial_state, order, flags, cu_seqlens] = inputs;
  using ssmkit::pointer;
  p.x = pointer<void>(x), p.dt = pointer<void>(dt), p.z = pointer<void>(z);
  p.A = pointer<void>(A), p.B = pointer<void>(B), p.C = pointer<void>(C);
  p.D = pointer<void>(D), p.dt_bias = pointer<void>(dt_bias);
  p.initial_state = pointer<void>(initial_state);
  p.order = pointer<std::int32_t>(order);
  p.flags = pointer<std::uint8_t>(flags);
  p.cu_seqlens = pointer<std::int64_t>(cu_seqlens);

  const auto [x_stride, dt_stride, z_stride, B_stride, C_stride] = strides;
  p.x_stride = x_stride, p.dt_stride = dt_stride, p.z_stride = z_stride;
  p.B_stride = B_stride, p.C_stride = C_stride;
}

void forward(const Sizes<5>& modes, const Sizes<7>& sizes, const Addresses<12>& inputs, const Sizes<5>& strides,
             const Addresses<3>& outputs) {
  ssmkit::SelectiveScanForward p;
  set_inputs(p, modes, sizes, inputs, strides);
  const auto [y, final_state, checkpoints] = outputs;
  using ssmkit::pointer;
  p.y_stride = p.dim;
  p.y = pointer<void>(y), p.final_state = pointer<void>(final_state), p.checkpoints = pointer<void>(checkpoints);
  SSMKIT_CPU(selective_scan_forward)(p);
}

void backward(const Sizes<5>& modes, const Sizes<7>& sizes, const Addresses<12>& inputs, const Sizes<5>& strides,
              const Addresses<3>& cotangents, std::int64_t dy_stride, const Addresses<9>& gradients) {
  ssmkit::SelectiveScanBackward p;
  set_inputs(p, modes, sizes, inputs, strides);
  using ssmkit::pointer;
  const auto [checkpoints, dy, dfinal_state] = cotangents;
  p.checkpoints = pointer<void>(checkpoints), p.dy = pointer<void>(dy), p.dfinal_state = pointer<void>(dfinal_state);
  p.dy_stride = dy_stride, p.ddt_stride = p.dim;
  p.dB_stride = p.B_groups * p.dstate, p.dC_stride = p.C_groups * p.dstate;
  const auto [dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state] = gradients;
  p.dx = pointer<void>(dx), p.ddt = pointer<void>(ddt), p.dz = pointer<void>(dz);
  p.dA = pointer<void>(dA), p.dB = pointer<void>(dB), p.dC = pointer<void>(dC);
  p.dD = pointer<void>(dD), p.ddt_bias = pointer<void>(ddt_bias), p.dinitial_state = pointer<void>(dinitial_state);
  SSMKIT_CPU(selective_scan_backward)(p);
}

const ssmkit::Registration kSelectiveScan([](py::module_& m) {
  m.def("selective_scan_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("selective_scan_backward", &backward, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
