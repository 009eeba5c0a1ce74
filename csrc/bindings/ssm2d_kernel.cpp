#include "cpu/ssm2d_kernel.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/ssm2d_kernel.py lists them.
void set_inputs(ssmkit::Ssm2dKernelParams& p, const Sizes<2>& modes, const Sizes<3>& sizes, std::uintptr_t A) {
  const auto [dtype, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.threads = static_cast<int>(threads);
  const auto [height, width, lanes] = sizes;
  p.height = height, p.width = width, p.lanes = lanes;
  p.A = ssmkit::pointer<void>(A);
}

void forward(const Sizes<2>& modes, const Sizes<3>& sizes, std::uintptr_t A, std::uintptr_t B,
             const Addresses<2>& outputs) {
  ssmkit::Ssm2dKernelForward p;
  set_inputs(p, modes, sizes, A);
  using ssmkit::pointer;
  const auto [h, v] = outputs;
  p.B = pointer<void>(B), p.h = pointer<void>(h), p.v = pointer<void>(v);
  SSMKIT_CPU(ssm2d_kernel_forward)(p);
}

void backward(const Sizes<2>& modes, const Sizes<3>& sizes, std::uintptr_t A, const Addresses<4>& kept,
              const Addresses<2>& gradients) {
  ssmkit::Ssm2dKernelBackward p;
  set_inputs(p, modes, sizes, A);
  using ssmkit::pointer;
  const auto [dh, dv, h, v] = kept;
  p.dh = pointer<void>(dh), p.dv = pointer<void>(dv), p.h = pointer<void>(h), p.v = pointer<void>(v);
  const auto [dA, dB] = gradients;
  p.dA = pointer<void>(dA), p.dB = pointer<void>(dB);
  SSMKIT_CPU(ssm2d_kernel_backward)(p);
}

const ssmkit::Registration kSsm2dKernel([](py::module_& m) {
  m.def("ssm2d_kernel_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("ssm2d_kernel_backward", &backward, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
