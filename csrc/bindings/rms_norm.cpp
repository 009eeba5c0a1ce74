#include "cpu/rms_norm.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;

// In the order in which ssmkit/native/rms_norm.py lists them.
void set_common(ssmkit::RmsNormParams& p, const Sizes<4>& modes, const Sizes<3>& sizes, const Addresses<3>& inputs,
                std::int64_t z_stride) {
  const auto [dtype, total_dtype, gate_after, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.total_dtype = static_cast<ssmkit::DType>(total_dtype);
  p.gate_after = gate_after != 0;
  p.threads = static_cast<int>(threads);
  const auto [rows, dim, group] = sizes;
  p.rows = rows, p.dim = dim, p.group = group;
  const auto [weight, bias, z] = inputs;
  using ssmkit::pointer;
  p.weight = pointer<void>(weight), p.bias = pointer<void>(bias), p.z = pointer<void>(z);
  p.z_stride = z_stride;
}

void forward(const Sizes<4>& modes, const Sizes<3>& sizes, const Addresses<3>& inputs, const Sizes<3>& strides,
             double eps, std::int64_t residual_dtype, const Addresses<2>& rows, const Addresses<3>& outputs) {
  ssmkit::RmsNormForward p;
  set_common(p, modes, sizes, inputs, strides[0]);
  using ssmkit::pointer;
  p.eps = eps;
  p.residual_dtype = static_cast<ssmkit::DType>(residual_dtype);
  p.x = pointer<void>(rows[0]), p.residual = pointer<void>(rows[1]);
  p.x_stride = strides[1], p.residual_stride = strides[2];
  const auto [y, total, rstd] = outputs;
  p.y = pointer<void>(y), p.total = pointer<void>(total), p.rstd = pointer<void>(rstd);
  SSMKIT_CPU(rms_norm_forward)(p);
}

void backward(const Sizes<4>& modes, const Sizes<3>& sizes, const Addresses<3>& inputs, const Sizes<5>& strides,
              const Addresses<5>& rows, const Addresses<4>& gradients) {
  ssmkit::RmsNormBackward p;
  set_common(p, modes, sizes, inputs, strides[0]);
  using ssmkit::pointer;
  const auto [dy, dtotal, total, rest, rstd] = rows;
  p.dy = pointer<void>(dy), p.dtotal = pointer<void>(dtotal), p.total = pointer<void>(total);
  p.rest = pointer<void>(rest), p.rstd = pointer<void>(rstd);
  p.dy_stride = strides[1], p.dtotal_stride = strides[2], p.total_stride = strides[3];
  p.rest_stride = strides[4];
  const auto [dx, dweight, dbias, dz] = gradients;
  p.dx = pointer<void>(dx), p.dweight = pointer<void>(dweight), p.dbias = pointer<void>(dbias);
  p.dz = pointer<void>(dz);
  SSMKIT_CPU(rms_norm_backward)(p);
}

const ssmkit::Registration kRmsNorm([](py::module_& m) {
  m.def("rms_norm_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm_backward", &backward, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
