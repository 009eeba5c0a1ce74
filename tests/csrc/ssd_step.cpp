// ssd_step against h <- exp(dt A) h + dt x B^T, y = h C + D x.
#include "cpu/ssd_step.h"

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Numbers = std::vector<double>;

struct Options {
  std::int64_t batch = 3, nheads = 6, headdim = 21, dstate = 16, groups = 1;
  DType dtype = DType::float32, state_dtype = DType::float32;
  bool softplus = true, D_per_head = false, D = true, z = true, dt_bias = true;
  double dt_min = 0.0, dt_max = INFINITY;
  std::vector<std::int64_t> slots;
  int threads = 1;
};

void run(const Options& o) {
  const std::int64_t slots = o.batch + 2, n = o.dstate, parts = o.groups * n, dim = o.nheads * o.headdim;
  const DType acc = o.dtype == DType::float64 ? DType::float64 : DType::float32;
  Tensor state(o.state_dtype, slots * dim, n), y(o.dtype, o.batch, dim);
  Tensor x(o.dtype, o.batch, dim, dim + 3), dt(o.dtype, o.batch, o.nheads, o.nheads + 2), z(o.dtype, o.batch, dim, dim + 1);
  Tensor B(o.dtype, o.batch, parts, parts + 5), C(o.dtype, o.batch, parts);
  Tensor A(acc, 1, o.nheads), D(acc, 1, dim), dt_bias(acc, 1, o.nheads);
  for (Tensor* tensor : {&state, &x, &z, &B, &C, &D}) tensor->random(1.0);
  A.random(1.0, -1.5), dt.random(0.4, 0.5), dt_bias.random(0.1);
  const Numbers u = x.values(), rate = dt.values(), gate = z.values(), b = B.values(), c = C.values();
  const Numbers decay = A.values(), skip = D.values(), bias = dt_bias.values();
  Numbers held = state.values(), expected(o.batch * dim, 0.0), size(o.batch * dim, 0.0);

  SsdStepParams p;
  p.dtype = o.dtype, p.state_dtype = o.state_dtype, p.softplus = o.softplus, p.threads = o.threads;
  p.batch = o.batch, p.nheads = o.nheads, p.headdim = o.headdim, p.ngroups = o.groups, p.dstate = n;
  p.dt_min = o.dt_min, p.dt_max = o.dt_max;
  p.state = state.data(), p.x = x.data(), p.dt = dt.data(), p.z = o.z ? z.data() : nullptr;
  p.B = B.data(), p.C = C.data(), p.A = A.data();
  p.D = o.D ? D.data() : nullptr, p.dt_bias = o.dt_bias ? dt_bias.data() : nullptr;
  p.slots = o.slots.empty() ? nullptr : o.slots.data();
  p.x_stride = x.stride(), p.dt_stride = dt.stride(), p.z_stride = z.stride();
  p.B_stride = B.stride(), p.C_stride = C.stride(), p.y = y.data();
  p.D_stride = o.D_per_head ? 1 : o.headdim, p.D_per_head = o.D_per_head;
  SSMKIT_CPU(ssd_step)(p);

  for (std::int64_t row = 0; row < o.batch; ++row) {
    const std::int64_t slot = o.slots.empty() ? row : o.slots[row];
    if (slot < 0) continue;
    for (std::int64_t channel = 0; channel < dim; ++channel) {
      const std::int64_t head = channel / o.headdim, at = row * dim + channel;
      const std::int64_t weight = row * parts + head / (o.nheads / o.groups) * n;
      double step = rate[row * o.nheads + head] + (o.dt_bias ? bias[head] : 0.0);
      if (o.softplus) step = std::log1p(std::exp(step));
      step = std::fmin(std::fmax(step, o.dt_min), o.dt_max);
      double sum = o.D ? skip[o.D_per_head ? head : channel] * u[at] : 0.0, terms = std::fabs(sum);
      for (std::int64_t i = 0; i < n; ++i) {
        double& h = held[(slot * dim + channel) * n + i];
        h = std::exp(step * decay[head]) * h + step * b[weight + i] * u[at];
        const double term = c[weight + i] * h;
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

const testing::Case kShapes("odd sizes, groups, slots, limits", [] {
  for (const std::int64_t headdim : {1, 5, 16, 35})
    for (const std::int64_t dstate : {1, 3, 16, 17, 130})
      for (const std::int64_t groups : {1, 2, 6}) {
        Options o;
        o.headdim = headdim, o.dstate = dstate, o.groups = groups, o.threads = 2;
        run(o);
        o.softplus = o.D = o.z = o.dt_bias = false, o.slots = {4, -1, 0}, o.dt_min = 0.3, o.dt_max = 0.7;
        run(o);
      }
});

const testing::Case kThreads("many threads", [] {
  Options o;
  o.headdim = 64, o.dstate = 128, o.threads = 5, o.D_per_head = true;
  run(o);
});

const testing::Case kEmpty("nothing to do", [] {
  Options o;
  o.batch = 0;
  run(o);
});

}  // namespace
