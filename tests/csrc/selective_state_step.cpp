// selective_state_step against h <- exp(dt A) h + dt B x, y = C h + D x.
#include "cpu/selective_state_step.h"

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Numbers = std::vector<double>;

struct Options {
  std::int64_t batch = 3, dim = 21, dstate = 16, groups = 1;
  DType dtype = DType::float32, state_dtype = DType::float32;
  bool softplus = true, D = true, z = true, dt_bias = true;
  std::vector<std::int64_t> slots;
  int threads = 1;
};

void run(const Options& o) {
  const std::int64_t slots = o.batch + 2, n = o.dstate, parts = o.groups * n;
  const DType acc = o.dtype == DType::float64 ? DType::float64 : DType::float32;
  Tensor state(o.state_dtype, slots * o.dim, n), y(o.dtype, o.batch, o.dim);
  Tensor x(o.dtype, o.batch, o.dim, o.dim + 3), dt(o.dtype, o.batch, o.dim), z(o.dtype, o.batch, o.dim, o.dim + 1);
  Tensor B(o.dtype, o.batch, parts, parts + 5), C(o.dtype, o.batch, parts);
  Tensor A(acc, o.dim, n), D(acc, 1, o.dim), dt_bias(acc, 1, o.dim);
  for (Tensor* tensor : {&state, &x, &z, &B, &C, &D}) tensor->random(1.0);
  A.random(1.0, -1.5), dt.random(0.4, 0.5), dt_bias.random(0.1);
  const Numbers u = x.values(), rate = dt.values(), gate = z.values(), b = B.values(), c = C.values();
  const Numbers decay = A.values(), skip = D.values(), bias = dt_bias.values();
  Numbers held = state.values(), expected(o.batch * o.dim, 0.0), size(o.batch * o.dim, 0.0);

  SelectiveStateStepParams p;
  p.dtype = o.dtype, p.state_dtype = o.state_dtype, p.softplus = o.softplus, p.threads = o.threads;
  p.batch = o.batch, p.dim = o.dim, p.dstate = n, p.groups_B = p.groups_C = o.groups;
  p.state = state.data(), p.x = x.data(), p.dt = dt.data(), p.z = o.z ? z.data() : nullptr;
  p.B = B.data(), p.C = C.data(), p.A = A.data();
  p.D = o.D ? D.data() : nullptr, p.dt_bias = o.dt_bias ? dt_bias.data() : nullptr;
  p.slots = o.slots.empty() ? nullptr : o.slots.data();
  p.x_stride = x.stride(), p.dt_stride = dt.stride(), p.z_stride = z.stride();
  p.B_stride = B.stride(), p.C_stride = C.stride(), p.y = y.data();
  SSMKIT_CPU(selective_state_step)(p);

  for (std::int64_t row = 0; row < o.batch; ++row) {
    const std::int64_t slot = o.slots.empty() ? row : o.slots[row];
    if (slot < 0) continue;
    for (std::int64_t channel = 0; channel < o.dim; ++channel) {
      const std::int64_t at = row * o.dim + channel, group = channel / (o.dim / o.groups);
      double step = rate[at] + (o.dt_bias ? bias[channel] : 0.0);
      if (o.softplus) step = std::log1p(std::exp(step));
      double sum = o.D ? skip[channel] * u[at] : 0.0, terms = std::fabs(sum);
      for (std::int64_t i = 0; i < n; ++i) {
        double& h = held[(slot * o.dim + channel) * n + i];
        h = std::exp(step * decay[channel * n + i]) * h + step * b[row * parts + group * n + i] * u[at];
        const double term = c[row * parts + group * n + i] * h;
        sum += term, terms += std::fabs(term);
      }
      const double open = o.z ? gate[at] / (1 + std::exp(-gate[at])) : 1.0;
      expected[at] = sum * open, size[at] = terms * std::fabs(open);
    }
  }
  testing::close("y", y.values(), expected, size, o.dtype);
  testing::close("state", state.values(), held, o.state_dtype);
}

const testing::Case kDTypes("every dtype of inputs and states", [] {
  for (const DType half : {DType::bfloat16, DType::float16}) {
    Options o;
    o.dtype = half, run(o);
    o.state_dtype = half, run(o);
  }
  Options o;
  o.dtype = o.state_dtype = DType::float64;
  run(o);
});

const testing::Case kShapes("odd sizes, groups, slots", [] {
  for (const std::int64_t dim : {1, 6, 48})
    for (const std::int64_t dstate : {1, 3, 16, 17, 64, 130})
      for (const std::int64_t groups : {1, 2, 3}) {
        if (dim % groups) continue;
        Options o;
        o.dim = dim, o.dstate = dstate, o.groups = groups, o.threads = 2;
        run(o);
        o.softplus = o.D = o.z = o.dt_bias = false, o.slots = {4, -1, 0};
        run(o);
      }
});

const testing::Case kEmpty("nothing to do", [] {
  Options o;
  o.batch = 0;
  run(o);
});

}  // namespace
