#include "cpu/causal_conv1d_step.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/causal_conv1d_step.py lists them.
void step(const Sizes<6>& modes, const Sizes<7>& sizes, const Addresses<7>& tensors) {
  ssmkit::CausalConv1dStepParams p;
  const auto [dtype, state_dtype, weight_dtype, bias_dtype, silu, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.state_dtype = static_cast<ssmkit::DType>(state_dtype);
  p.weight_dtype = static_cast<ssmkit::DType>(weight_dtype);
  p.bias_dtype = static_cast<ssmkit::DType>(bias_dtype);
  p.silu = silu != 0;
  p.threads = static_cast<int>(threads);
  const auto [batch, seqlen, dim, width, state_len, x_batch_stride, x_stride] = sizes;
  p.batch = batch, p.seqlen = seqlen, p.dim = dim, p.width = width, p.state_len = state_len;
  p.x_batch_stride = x_batch_stride, p.x_stride = x_stride;
  const auto [x, state, weight, bias, seen, slots, y] = tensors;
  using ssmkit::pointer;
  p.x = pointer<void>(x), p.state = pointer<void>(state), p.weight = pointer<void>(weight);
  p.bias = pointer<void>(bias), p.seen = pointer<std::int64_t>(seen), p.slots = pointer<std::int64_t>(slots);
  p.y = pointer<void>(y);
  SSMKIT_CPU(causal_conv1d_step)(p);
}

const ssmkit::Registration kCausalConv1dStep([](py::module_& m) {
  m.def("causal_conv1d_step", &step, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
