#include "cpu/grid_scan.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/grid_scan.py lists them.
void set_inputs(ssmkit::GridScanParams& p, const Sizes<5>& modes, const Sizes<5>& sizes, const Addresses<12>& inputs,
                const Sizes<7>& strides) {
  const auto [dtype, dt_softplus, from_bottom, from_right, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.dt_softplus = dt_softplus != 0;
  p.from_bottom = from_bottom != 0, p.from_right = from_right != 0;
  p.threads = static_cast<int>(threads);

  const auto [batch, height, width, dim, dstate] = sizes;
  p.batch = batch, p.height = height, p.width = width, p.dim = dim, p.dstate = dstate;

  const auto [x, dt_top, dt_left, A_top, A_left, B_top, B_left, C, D, z, dt_bias_top, dt_bias_left] = inputs;
  using ssmkit::kLeft, ssmkit::kTop, ssmkit::pointer;
  p.x = pointer<void>(x), p.z = pointer<void>(z), p.C = pointer<void>(C), p.D = pointer<void>(D);
  p.dt[kTop] = pointer<void>(dt_top), p.dt[kLeft] = pointer<void>(dt_left);
  p.A[kTop] = pointer<void>(A_top), p.A[kLeft] = pointer<void>(A_left);
  p.B[kTop] = pointer<void>(B_top), p.B[kLeft] = pointer<void>(B_left);
  p.dt_bias[kTop] = pointer<void>(dt_bias_top), p.dt_bias[kLeft] = pointer<void>(dt_bias_left);

  const auto [x_stride, dt_top_stride, dt_left_stride, B_top_stride, B_left_stride, C_stride, z_stride] = strides;
  p.x_stride = x_stride, p.z_stride = z_stride, p.C_stride = C_stride;
  p.dt_stride[kTop] = dt_top_stride, p.dt_stride[kLeft] = dt_left_stride;
  p.B_stride[kTop] = B_top_stride, p.B_stride[kLeft] = B_left_stride;
}

void forward(const Sizes<5>& modes, const Sizes<5>& sizes, const Addresses<12>& inputs, const Sizes<7>& strides,
             const Addresses<2>& outputs) {
  ssmkit::GridScanForward p;
  set_inputs(p, modes, sizes, inputs, strides);
  p.y = ssmkit::pointer<void>(outputs[0]), p.checkpoints = ssmkit::pointer<void>(outputs[1]);
  SSMKIT_CPU(grid_scan_forward)(p);
}

void backward(const Sizes<5>& modes, const Sizes<5>& sizes, const Addresses<12>& inputs, const Sizes<7>& strides,
              const Addresses<2>& cotangents, std::int64_t dy_stride, const Addresses<12>& gradients) {
  ssmkit::GridScanBackward p;
  set_inputs(p, modes, sizes, inputs, strides);
  using ssmkit::kLeft, ssmkit::kTop, ssmkit::pointer;
  p.checkpoints = pointer<void>(cotangents[0]), p.dy = pointer<void>(cotangents[1]), p.dy_stride = dy_stride;
  const auto [dx, ddt_top, ddt_left, dA_top, dA_left, dB_top, dB_left, dC, dD, dz, ddt_bias_top, ddt_bias_left] =
      gradients;
  p.dx = pointer<void>(dx), p.dz = pointer<void>(dz), p.dC = pointer<void>(dC), p.dD = pointer<void>(dD);
  p.ddt[kTop] = pointer<void>(ddt_top), p.ddt[kLeft] = pointer<void>(ddt_left);
  p.dA[kTop] = pointer<void>(dA_top), p.dA[kLeft] = pointer<void>(dA_left);
  p.dB[kTop] = pointer<void>(dB_top), p.dB[kLeft] = pointer<void>(dB_left);
  p.ddt_bias[kTop] = pointer<void>(ddt_bias_top), p.ddt_bias[kLeft] = pointer<void>(ddt_bias_left);
  SSMKIT_CPU(grid_scan_backward)(p);
}

const ssmkit::Registration kGridScan([](py::module_& m) {
  m.def("grid_scan_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("grid_scan_backward", &backward, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
