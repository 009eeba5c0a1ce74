#include "cpu/ssd.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/ssd.py lists them.
void set_inputs(ssmkit::SsdParams& p, const Sizes<6>& modes, const std::array<double, 2>& dt_limit,
                const Sizes<7>& sizes, const Addresses<11>& inputs, const Sizes<5>& strides) {
  const auto [dtype, dt_softplus, reverse, wide, threads, chunk] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.dt_softplus = dt_softplus != 0, p.reverse = reverse != 0, p.wide = wide != 0;
  p.threads = static_cast<int>(threads), p.chunk = static_cast<int>(chunk);
  p.dt_min = dt_limit[0], p.dt_max = dt_limit[1];

  const auto [batch, seqlen, nheads, headdim, ngroups, dstate, nseq] = sizes;
  p.batch = batch, p.seqlen = seqlen, p.nheads = nheads, p.headdim = headdim;
  p.ngroups = ngroups, p.dstate = dstate, p.nseq = nseq;

  const auto [x, dt, A, B, C, D, z, dt_bias, initial_state, flags, cu_seqlens] = inputs;
  using ssmkit::pointer;
  p.x = pointer<void>(x), p.dt = pointer<void>(dt), p.z = pointer<void>(z);
  p.A = pointer<void>(A), p.B = pointer<void>(B), p.C = pointer<void>(C);
  p.D = pointer<void>(D), p.dt_bias = pointer<void>(dt_bias);
  p.initial_state = pointer<void>(initial_state);
  p.flags = pointer<std::uint8_t>(flags);
  p.cu_seqlens = pointer<std::int64_t>(cu_seqlens);

  const auto [x_stride, dt_stride, B_stride, C_stride, z_stride] = strides;
  p.x_stride = x_stride, p.dt_stride = dt_stride, p.B_stride = B_stride, p.C_stride = C_stride, p.z_stride = z_stride;
}

void forward(const Sizes<6>& modes, const std::array<double, 2>& dt_limit, const Sizes<7>& sizes,
             const Addresses<11>& inputs, const Sizes<5>& strides, const Addresses<5>& outputs) {
  ssmkit::SsdForward p;
  set_inputs(p, modes, dt_limit, sizes, inputs, strides);
  using ssmkit::pointer;
  const auto [addend, y, final_state, checkpoints, ungated] = outputs;
  p.addend = pointer<void>(addend), p.y = pointer<void>(y), p.final_state = pointer<void>(final_state);
  p.checkpoints = pointer<void>(checkpoints), p.ungated = pointer<void>(ungated);
  SSMKIT_CPU_BF16(ssd_forward)(p);
}

void backward(const Sizes<6>& modes, const std::array<double, 2>& dt_limit, const Sizes<7>& sizes,
              const Addresses<11>& inputs, const Sizes<5>& strides, const Addresses<4>& cotangents,
              std::int64_t dy_stride, const Addresses<9>& gradients) {
  ssmkit::SsdBackward p;
  set_inputs(p, modes, dt_limit, sizes, inputs, strides);
  using ssmkit::pointer;
  const auto [dy, dfinal_state, checkpoints, ungated] = cotangents;
  p.dy = pointer<void>(dy), p.dfinal_state = pointer<void>(dfinal_state);
  p.checkpoints = pointer<void>(checkpoints), p.ungated = pointer<void>(ungated);
  p.dy_stride = dy_stride;
  const auto [dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state] = gradients;
  p.dx = pointer<void>(dx), p.ddt = pointer<void>(ddt), p.dz = pointer<void>(dz);
  p.dA = pointer<void>(dA), p.dB = pointer<void>(dB), p.dC = pointer<void>(dC);
  p.dD = pointer<void>(dD), p.ddt_bias = pointer<void>(ddt_bias), p.dinitial_state = pointer<void>(dinitial_state);
  SSMKIT_CPU_BF16(ssd_backward)(p);
}

const ssmkit::Registration kSsd([](py::module_& m) {
  m.def("ssd_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("ssd_backward", &backward, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
