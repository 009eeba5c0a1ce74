#include "cpu/ssd_noncausal.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/ssd_noncausal.py lists them.
void set_inputs(ssmkit::SsdNoncausalParams& p, const Sizes<4>& modes, const Sizes<7>& sizes, const Addresses<9>& inputs,
                const Sizes<4>& strides) {
  const auto [dtype, dt_softplus, interleaved, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.dt_softplus = dt_softplus != 0, p.interleaved = interleaved != 0, p.threads = static_cast<int>(threads);
  const auto [batch, seqlen, nheads, headdim, ngroups, dstate, nseq] = sizes;
  p.batch = batch, p.seqlen = seqlen, p.nheads = nheads, p.headdim = headdim;
  p.ngroups = ngroups, p.dstate = dstate, p.nseq = nseq;
  const auto [x, dt, A, B, C, D, dt_bias, flags, cu_seqlens] = inputs;
  using ssmkit::pointer;
  p.x = pointer<void>(x), p.dt = pointer<void>(dt), p.A = pointer<void>(A), p.B = pointer<void>(B);
  p.C = pointer<void>(C), p.D = pointer<void>(D), p.dt_bias = pointer<void>(dt_bias);
  p.flags = pointer<std::uint8_t>(flags), p.cu_seqlens = pointer<std::int64_t>(cu_seqlens);
  const auto [x_stride, dt_stride, B_stride, C_stride] = strides;
  p.x_stride = x_stride, p.dt_stride = dt_stride, p.B_stride = B_stride, p.C_stride = C_stride;
}

void forward(const Sizes<4>& modes, const Sizes<7>& sizes, const Addresses<9>& inputs, const Sizes<4>& strides,
             const Addresses<2>& outputs) {
  ssmkit::SsdNoncausalForward p;
  set_inputs(p, modes, sizes, inputs, strides);
  p.y = ssmkit::pointer<void>(outputs[0]), p.state = ssmkit::pointer<void>(outputs[1]);
  SSMKIT_CPU(ssd_noncausal_forward)(p);
}

void backward(const Sizes<4>& modes, const Sizes<7>& sizes, const Addresses<9>& inputs, const Sizes<4>& strides,
              const Addresses<3>& cotangents, std::int64_t dy_stride, const Addresses<7>& gradients) {
  ssmkit::SsdNoncausalBackward p;
  set_inputs(p, modes, sizes, inputs, strides);
  using ssmkit::pointer;
  const auto [dy, dfinal, state] = cotangents;
  p.dy = pointer<void>(dy), p.dfinal = pointer<void>(dfinal), p.state = pointer<void>(state);
  p.dy_stride = dy_stride;
  const auto [dx, ddt, dA, dB, dC, dD, ddt_bias] = gradients;
  p.dx = pointer<void>(dx), p.ddt = pointer<void>(ddt), p.dB = pointer<void>(dB), p.dC = pointer<void>(dC);
  p.dA = pointer<void>(dA), p.dD = pointer<void>(dD), p.ddt_bias = pointer<void>(ddt_bias);
  SSMKIT_CPU(ssd_noncausal_backward)(p);
}

const ssmkit::Registration kSsdNoncausal([](py::module_& m) {
  m.def("ssd_noncausal_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("ssd_noncausal_backward", &backward, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
