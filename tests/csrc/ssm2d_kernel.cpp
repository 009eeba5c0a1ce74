// ssm2d_kernel against its recurrence and the adjoint of it written out in double.
#include "cpu/ssm2d_kernel.h"

#include <complex>

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Number = std::complex<double>;
using Numbers = std::vector<Number>;

struct Options {
  std::int64_t height = 4, width = 5, lanes = 19;
  DType dtype = DType::float32;
  int threads = 1;
};

bool is_complex(DType dtype) { return dtype == DType::complex64 || dtype == DType::complex128; }

Numbers numbers(const Tensor& tensor) {
  const std::vector<double> parts = tensor.values();
  Numbers result;
  const std::size_t step = is_complex(tensor.dtype()) ? 2 : 1;
  for (std::size_t i = 0; i < parts.size(); i += step) result.emplace_back(parts[i], step == 2 ? parts[i + 1] : 0.0);
  return result;
}

// `slack` as for gradients of parameters in ssmkit.testing: sums over all cells, of terms of both signs.
void close(const std::string& name, const Tensor& actual, const Numbers& expected, double slack = 1.0) {
  std::vector<double> parts;
  for (const Number& x : expected) {
    parts.push_back(x.real());
    if (is_complex(actual.dtype())) parts.push_back(x.imag());
  }
  testing::close(name, actual.values(), parts, actual.dtype(), slack);
}

void run(const Options& o) {
  const std::int64_t cells = o.height * o.width;
  Tensor A(o.dtype, 4, o.lanes), B(o.dtype, 2, o.lanes), dA(o.dtype, 4, o.lanes), dB(o.dtype, 2, o.lanes);
  Tensor h(o.dtype, cells, o.lanes), v(o.dtype, cells, o.lanes), dh(o.dtype, cells, o.lanes), dv(o.dtype, cells, o.lanes);
  A.random(0.3, 0.4), B.random(0.5, 0.5), dh.random(1.0), dv.random(1.0);

  Ssm2dKernelForward f;
  f.dtype = o.dtype, f.threads = o.threads, f.height = o.height, f.width = o.width, f.lanes = o.lanes;
  f.A = A.data(), f.B = B.data(), f.h = h.data(), f.v = v.data();
  SSMKIT_CPU(ssm2d_kernel_forward)(f);
  Ssm2dKernelBackward g;
  static_cast<Ssm2dKernelParams&>(g) = f;
  g.dh = dh.data(), g.dv = dv.data(), g.h = h.data(), g.v = v.data(), g.dA = dA.data(), g.dB = dB.data();
  SSMKIT_CPU(ssm2d_kernel_backward)(g);

  const Numbers A_ = numbers(A), B_ = numbers(B);
  Numbers eh(cells * o.lanes), ev(eh), gh = numbers(dh), gv = numbers(dv), eA(4 * o.lanes), eB(2 * o.lanes);
  const auto at = [&](std::int64_t i, std::int64_t j, std::int64_t n) { return (i * o.width + j) * o.lanes + n; };
  const auto factor = [](std::int64_t i, std::int64_t j) { return i > 0 && j > 0 ? 0.5 : 1.0; };
  for (std::int64_t n = 0; n < o.lanes; ++n) {
    const Number A1 = A_[n], A2 = A_[o.lanes + n], A3 = A_[2 * o.lanes + n], A4 = A_[3 * o.lanes + n];
    for (std::int64_t i = 0; i < o.height; ++i)
      for (std::int64_t j = 0; j < o.width; ++j) {
        Number& x = eh[at(i, j, n)];
        Number& y = ev[at(i, j, n)];
        if (i == 0 && j == 0) x = B_[n], y = B_[o.lanes + n];
        if (j > 0) x = factor(i, j) * (A1 * eh[at(i, j - 1, n)] + A2 * ev[at(i, j - 1, n)]);
        if (i > 0) y = factor(i, j) * (A3 * eh[at(i - 1, j, n)] + A4 * ev[at(i - 1, j, n)]);
      }
    for (std::int64_t i = o.height - 1; i >= 0; --i)
      for (std::int64_t j = o.width - 1; j >= 0; --j) {
        const Number x = factor(i, j) * gh[at(i, j, n)], y = factor(i, j) * gv[at(i, j, n)];
        if (j > 0) {
          const std::int64_t left = at(i, j - 1, n);
          gh[left] += std::conj(A1) * x, gv[left] += std::conj(A2) * x;
          eA[n] += std::conj(eh[left]) * x, eA[o.lanes + n] += std::conj(ev[left]) * x;
        }
        if (i > 0) {
          const std::int64_t above = at(i - 1, j, n);
          gh[above] += std::conj(A3) * y, gv[above] += std::conj(A4) * y;
          eA[2 * o.lanes + n] += std::conj(eh[above]) * y, eA[3 * o.lanes + n] += std::conj(ev[above]) * y;
        }
      }
    if (cells > 0) eB[n] = gh[at(0, 0, n)], eB[o.lanes + n] = gv[at(0, 0, n)];
  }
  close("h", h, eh);
  close("v", v, ev);
  close("dA", dA, eA, 8.0);
  close("dB", dB, eB, 8.0);
}

const testing::Case kDTypes("every dtype", [] {
  for (DType dtype : {DType::float32, DType::float64, DType::complex64, DType::complex128}) {
    Options o;
    o.dtype = dtype;
    run(o);
  }
});

const testing::Case kShapes("odd sizes, one row, one column, none", [] {
  for (std::int64_t height : {0, 1, 2, 7})
    for (std::int64_t width : {0, 1, 3, 9})
      for (std::int64_t lanes : {1, 16, 67}) {
        Options o;
        o.height = height, o.width = width, o.lanes = lanes;
        run(o);
        o.dtype = DType::complex64;
        run(o);
      }
});

const testing::Case kThreads("states shared by threads", [] {
  for (std::int64_t lanes : {3, 70})
    for (DType dtype : {DType::float32, DType::complex128}) {
      Options o;
      o.lanes = lanes, o.dtype = dtype, o.threads = 5;
      run(o);
    }
});

}  // namespace
