#include "cpu/causal_conv1d.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/causal_conv1d.py lists them.
void set_inputs(ssmkit::CausalConv1dParams& p, const Sizes<4>& modes, const Sizes<6>& sizes, const Addresses<7>& inputs) {
  const auto [dtype, silu, reverse, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.silu = silu != 0;
  p.reverse = reverse != 0;
  p.threads = static_cast<int>(threads);
  const auto [batch, seqlen, dim, width, nseq, x_stride] = sizes;
  p.batch = batch, p.seqlen = seqlen, p.dim = dim, p.width = width, p.nseq = nseq, p.x_stride = x_stride;
  const auto [x, weight, bias, initial_state, order, flags, cu_seqlens] = inputs;
  using ssmkit::pointer;
  p.x = pointer<void>(x), p.weight = pointer<void>(weight), p.bias = pointer<void>(bias);
  p.initial_state = pointer<void>(initial_state);
  p.order = pointer<std::int32_t>(order);
  p.flags = pointer<std::uint8_t>(flags);
  p.cu_seqlens = pointer<std::int64_t>(cu_seqlens);
}

void forward(const Sizes<4>& modes, const Sizes<6>& sizes, const Addresses<7>& inputs, const Addresses<2>& outputs) {
  ssmkit::CausalConv1dForward p;
  set_inputs(p, modes, sizes, inputs);
  const auto [y, final_state] = outputs;
  p.y = ssmkit::pointer<void>(y), p.final_state = ssmkit::pointer<void>(final_state);
  SSMKIT_CPU(causal_conv1d_forward)(p);
}

void backward(const Sizes<4>& modes, const Sizes<6>& sizes, const Addresses<7>& inputs, const Addresses<2>& cotangents,
              std::int64_t dy_stride, const Addresses<4>& gradients) {
  ssmkit::CausalConv1dBackward p;
  set_inputs(p, modes, sizes, inputs);
  const auto [dy, dfinal_state] = cotangents;
  using ssmkit::pointer;
  p.dy = pointer<void>(dy), p.dfinal_state = pointer<void>(dfinal_state), p.dy_stride = dy_stride;
  const auto [dx, dweight, dbias, dinitial_state] = gradients;
  p.dx = pointer<void>(dx), p.dweight = pointer<void>(dweight), p.dbias = pointer<void>(dbias);
  p.dinitial_state = pointer<void>(dinitial_state);
  SSMKIT_CPU(causal_conv1d_backward)(p);
}

const ssmkit::Registration kCausalConv1d([](py::module_& m) {
  m.def("causal_conv1d_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("causal_conv1d_backward", &backward, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
