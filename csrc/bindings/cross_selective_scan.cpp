#include "cpu/cross_selective_scan.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "bindings/registry.h"

namespace {

template <std::size_t count> using Addresses = std::array<std::uintptr_t, count>;
template <std::size_t count> using Sizes = std::array<std::int64_t, count>;
// Per path: order, flags, reverse.
using Tables = std::vector<std::tuple<std::uintptr_t, std::uintptr_t, bool>>;

// In the order in which ssmkit/native/cross_selective_scan.py lists them.
std::vector<ssmkit::ScanPathTables> set_inputs(ssmkit::CrossSelectiveScanParams& p, const Sizes<4>& modes,
                                               const Sizes<8>& sizes, const Addresses<9>& inputs,
                                               const Sizes<8>& strides, const Tables& tables) {
  using ssmkit::pointer;
  const auto [dtype, dt_softplus, merged, threads] = modes;
  p.dtype = static_cast<ssmkit::DType>(dtype);
  p.dt_softplus = dt_softplus != 0, p.merged = merged != 0, p.threads = static_cast<int>(threads);

  const auto [batch, seqlen, dim, dstate, npaths, B_groups, C_groups, dt_rank] = sizes;
  p.batch = batch, p.seqlen = seqlen, p.dim = dim, p.dstate = dstate;
  p.npaths = npaths, p.B_groups = B_groups, p.C_groups = C_groups, p.dt_rank = dt_rank;

  const auto [x, dt, A, B, C, D, z, dt_bias, dt_weight] = inputs;
  p.x = pointer<void>(x), p.dt = pointer<void>(dt), p.z = pointer<void>(z);
  p.A = pointer<void>(A), p.B = pointer<void>(B), p.C = pointer<void>(C);
  p.D = pointer<void>(D), p.dt_bias = pointer<void>(dt_bias), p.dt_weight = pointer<void>(dt_weight);

  const auto [x_stride, dt_stride, z_stride, B_stride, C_stride, dt_path, B_path, C_path] = strides;
  p.x_stride = x_stride, p.dt_stride = dt_stride, p.z_stride = z_stride, p.B_stride = B_stride, p.C_stride = C_stride;
  p.dt_path = dt_path, p.B_path = B_path, p.C_path = C_path;

  std::vector<ssmkit::ScanPathTables> paths;
  for (const auto& [order, flags, reverse] : tables)
    paths.push_back({pointer<std::int32_t>(order), pointer<std::uint8_t>(flags), reverse});
  p.paths = paths.data();
  return paths;
}

void forward(const Sizes<4>& modes, const Sizes<8>& sizes, const Addresses<9>& inputs, const Sizes<8>& strides,
             const Tables& tables, const Addresses<2>& outputs) {
  ssmkit::CrossSelectiveScanForward p;
  const auto paths = set_inputs(p, modes, sizes, inputs, strides, tables);
  const auto [y, checkpoints] = outputs;
  p.y = ssmkit::pointer<void>(y), p.checkpoints = ssmkit::pointer<void>(checkpoints);
  SSMKIT_CPU(cross_selective_scan_forward)(p);
}

void backward(const Sizes<4>& modes, const Sizes<8>& sizes, const Addresses<9>& inputs, const Sizes<8>& strides,
              const Tables& tables, const Addresses<2>& cotangents, const Sizes<2>& dy_strides,
              const Addresses<9>& gradients) {
  ssmkit::CrossSelectiveScanBackward p;
  const auto paths = set_inputs(p, modes, sizes, inputs, strides, tables);
  using ssmkit::pointer;
  const auto [checkpoints, dy] = cotangents;
  p.checkpoints = pointer<void>(checkpoints), p.dy = pointer<void>(dy);
  p.dy_stride = dy_strides[0], p.dy_path = dy_strides[1];
  const auto [dx, ddt, dA, dB, dC, dD, dz, ddt_bias, ddt_weight] = gradients;
  p.dx = pointer<void>(dx), p.ddt = pointer<void>(ddt), p.dz = pointer<void>(dz);
  p.dA = pointer<void>(dA), p.dB = pointer<void>(dB), p.dC = pointer<void>(dC);
  p.dD = pointer<void>(dD), p.ddt_bias = pointer<void>(ddt_bias), p.ddt_weight = pointer<void>(ddt_weight);
  SSMKIT_CPU(cross_selective_scan_backward)(p);
}

const ssmkit::Registration kCrossSelectiveScan([](py::module_& m) {
  m.def("cross_selective_scan_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("cross_selective_scan_backward", &backward, py::call_guard<py::gil_scoped_release>());
});

}  // namespace
