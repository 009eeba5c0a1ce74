#include "cpu/ssd_step.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/ssd_step.py lists them.
void step(const Sizes<4>& modes, const std::array<double, 2>& dt_limit, const Sizes<5>& sizes,
          const Addresses<11>& tensors, const Sizes<6>& strides, bool D_per_channel) {
  ssmkit::SsdStepParams p;
  const auto [dtype, state_dtype, softplus, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.state_dtype = static_cast<ssmkit::DType>(state_dtype);
  p.softplus = softplus != 0;
  p.threads = static_cast<int>(threads);
  p.dt_min = dt_limit[0], p.dt_max = dt_limit[1];
  const auto [batch, nheads, headdim, ngroups, dstate] = sizes;
  p.batch = batch, p.nheads = nheads, p.headdim = headdim, p.ngroups = ngroups, p.dstate = dstate;
  const auto [state, x, dt, z, B, C, A, D, dt_bias, slots, y] = tensors;
  using ssmkit::pointer;
  p.state = pointer<void>(state), p.x = pointer<void>(x), p.dt = pointer<void>(dt), p.z = pointer<void>(z);
  p.B = pointer<void>(B), p.C = pointer<void>(C), p.A = pointer<void>(A), p.D = pointer<void>(D);
  p.dt_bias = pointer<void>(dt_bias), p.slots = pointer<std::int64_t>(slots), p.y = pointer<void>(y);
  const auto [x_stride, dt_stride, z_stride, B_stride, C_stride, D_stride] = strides;
  p.x_stride = x_stride, p.dt_stride = dt_stride, p.z_stride = z_stride;
  p.B_stride = B_stride, p.C_stride = C_stride, p.D_stride = D_stride, p.D_per_head = !D_per_channel;
  SSMKIT_CPU(ssd_step)(p);
}

const ssmkit::Registration kSsdStep([](py::module_& m) {
  m.def("ssd_step", &step, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
