#include "cpu/linear_step.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/linear_step.py lists them.
void step(int dtype, int threads, const Sizes<5>& sizes, const Addresses<4>& tensors) {
  ssmkit::LinearStepParams p;
  p.dtype = static_cast<ssmkit::DType>(dtype), p.threads = threads;
  const auto [batch, in_features, out_features, x_stride, weight_stride] = sizes;
  p.batch = batch, p.in_features = in_features, p.out_features = out_features;
  p.x_stride = x_stride, p.weight_stride = weight_stride;
  const auto [x, weight, bias, y] = tensors;
  using ssmkit::pointer;
  p.x = pointer<void>(x), p.weight = pointer<void>(weight), p.bias = pointer<void>(bias), p.y = pointer<void>(y);
  SSMKIT_CPU(linear_step)(p);
}

const ssmkit::Registration kLinearStep([](py::module_& m) {
  m.def("linear_step", &step, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
