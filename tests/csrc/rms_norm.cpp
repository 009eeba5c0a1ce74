// rms_norm against its equations and their derivatives, row by row.
#include "cpu/rms_norm.h"

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Numbers = std::vector<double>;

struct Options {
  std::int64_t rows = 5, dim = 42, group = 21;
  DType dtype = DType::float32, residual_dtype = DType::float32, total_dtype = DType::float32;
  bool bias = true, residual = true, z = true, gate_after = true;
  int threads = 1;
};

double logistic(double z) { return 1 / (1 + std::exp(-z)); }

// Results in double; for differences and sums of terms that may cancel, the size of the terms.
struct Expected {
  Numbers y, total, rstd, dx, dz, dweight, dbias, dx_size, dz_size, dweight_size, dbias_size;
};

Expected by_definition(const Options& o, const Numbers& total, const Numbers& weight, const Numbers& bias,
                       const Numbers& z, const Numbers& dy, const Numbers& dtotal, double eps) {
  const std::size_t count = o.rows * o.dim, groups = o.rows * (o.dim / o.group);
  Expected e{Numbers(count), total, Numbers(groups), Numbers(count), Numbers(count), Numbers(o.dim), Numbers(o.dim),
             Numbers(count), Numbers(count), Numbers(o.dim), Numbers(o.dim)};
  for (std::size_t g = 0; g < groups; ++g) {
    const std::size_t first = g * o.group;
    Numbers v(o.group), grad(o.group);
    double squares = 0, dot = 0, dot_size = 0;
    for (std::int64_t i = 0; i < o.group; ++i) {
      const double open = o.z ? z[first + i] * logistic(z[first + i]) : 1.0;
      v[i] = total[first + i] * (o.gate_after ? 1.0 : open);
      squares += v[i] * v[i];
    }
    const double r = e.rstd[g] = 1 / std::sqrt(squares / o.group + eps);
    for (std::int64_t i = 0; i < o.group; ++i) {
      const std::size_t at = first + i, c = at % o.dim;
      const double s = o.z ? logistic(z[at]) : 0.0, open = o.z ? z[at] * s : 1.0;
      const double scaled = v[i] * r * weight[c] + (o.bias ? bias[c] : 0.0);
      const bool after = o.z && o.gate_after;
      e.y[at] = scaled * (after ? open : 1.0);
      const double slope = s * (1 + z[at] * (1 - s));
      const double scaled_size = std::fabs(v[i] * r * weight[c]) + (o.bias ? std::fabs(bias[c]) : 0.0);
      if (after) e.dz[at] = dy[at] * scaled * slope, e.dz_size[at] = std::fabs(dy[at] * slope) * scaled_size;
      const double out = dy[at] * (after ? open : 1.0);
      e.dweight[c] += out * v[i] * r, e.dweight_size[c] += std::fabs(out * v[i] * r);
      e.dbias[c] += out, e.dbias_size[c] += std::fabs(out);
      grad[i] = out * weight[c], dot += grad[i] * v[i] * r, dot_size += std::fabs(grad[i] * v[i] * r);
    }
    for (std::int64_t i = 0; i < o.group; ++i) {
      const std::size_t at = first + i;
      double dv = (grad[i] - v[i] * r * dot / o.group) * r;
      double dv_size = (std::fabs(grad[i]) + std::fabs(v[i]) * r * dot_size / o.group) * r;
      if (o.z && !o.gate_after) {
        const double s = logistic(z[at]), slope = total[at] * s * (1 + z[at] * (1 - s));
        e.dz[at] = dv * slope, e.dz_size[at] = dv_size * std::fabs(slope);
        dv *= z[at] * s, dv_size *= std::fabs(z[at] * s);
      }
      e.dx[at] = dv + dtotal[at], e.dx_size[at] = dv_size + std::fabs(dtotal[at]);
    }
  }
  return e;
}

void run(const Options& o) {
  const DType acc = o.dtype == DType::float64 ? DType::float64 : DType::float32;
  const DType total_dtype = o.residual ? o.total_dtype : o.dtype;
  const std::int64_t ngroups = o.dim / o.group;
  Tensor x(o.dtype, o.rows, o.dim, o.dim + 3), residual(o.residual_dtype, o.rows, o.dim, o.dim + 1);
  Tensor z(o.dtype, o.rows, o.dim), weight(acc, 1, o.dim), bias(acc, 1, o.dim);
  Tensor y(o.dtype, o.rows, o.dim), total(total_dtype, o.rows, o.dim), rstd(acc, o.rows, ngroups);
  Tensor dy(o.dtype, o.rows, o.dim, o.dim + 2), dtotal(total_dtype, o.rows, o.dim), rest(total_dtype, o.rows, o.dim);
  Tensor dx(total_dtype, o.rows, o.dim), dz(o.dtype, o.rows, o.dim), dweight(acc, 1, o.dim), dbias(acc, 1, o.dim);
  for (Tensor* tensor : {&x, &residual, &z, &bias, &dy, &dtotal, &rest}) tensor->random(1.0);
  weight.random(0.3, 1.0);

  RmsNormForward p;
  p.dtype = o.dtype, p.total_dtype = total_dtype, p.gate_after = o.gate_after, p.threads = o.threads;
  p.rows = o.rows, p.dim = o.dim, p.group = o.group, p.weight = weight.data();
  p.bias = o.bias ? bias.data() : nullptr, p.z = o.z ? z.data() : nullptr, p.z_stride = z.stride();
  p.eps = 1e-5, p.residual_dtype = o.residual_dtype, p.x = x.data(), p.x_stride = x.stride();
  p.residual = o.residual ? residual.data() : nullptr, p.residual_stride = residual.stride();
  p.y = y.data(), p.total = o.residual ? total.data() : nullptr, p.rstd = rstd.data();
  SSMKIT_CPU(rms_norm_forward)(p);

  Numbers sum = x.values();
  const Numbers added = residual.values();
  for (std::size_t i = 0; o.residual && i < sum.size(); ++i) sum[i] += added[i];
  const Numbers none(sum.size(), 0.0);
  const Expected e =
      by_definition(o, sum, weight.values(), bias.values(), z.values(), dy.values(), none, p.eps);
  testing::close("y", y.values(), e.y, o.dtype);
  testing::close("rstd", rstd.values(), e.rstd, acc);
  if (o.residual) testing::close("total", total.values(), e.total, total_dtype);

  // Backward is handed a sum in two parts with the statistics of what they make.
  Numbers kept = total.random(1.0).values();
  const Numbers rests = rest.values();
  for (std::size_t i = 0; o.residual && i < kept.size(); ++i) kept[i] += rests[i];
  const Numbers through = o.residual ? dtotal.values() : none;
  const Expected f =
      by_definition(o, kept, weight.values(), bias.values(), z.values(), dy.values(), through, p.eps);
  rstd.set(f.rstd);
  RmsNormBackward q;
  static_cast<RmsNormParams&>(q) = p;
  q.dy = dy.data(), q.dy_stride = dy.stride(), q.total = total.data(), q.total_stride = total.stride();
  q.dtotal = o.residual ? dtotal.data() : nullptr, q.dtotal_stride = dtotal.stride();
  q.rest = o.residual ? rest.data() : nullptr, q.rest_stride = rest.stride(), q.rstd = rstd.data();
  q.dx = dx.data(), q.dz = o.z ? dz.data() : nullptr;
  q.dweight = dweight.data(), q.dbias = o.bias ? dbias.data() : nullptr;
  SSMKIT_CPU(rms_norm_backward)(q);

  testing::close("dx", dx.values(), f.dx, f.dx_size, total_dtype);
  testing::close("dweight", dweight.values(), f.dweight, f.dweight_size, acc);
  if (o.bias) testing::close("dbias", dbias.values(), f.dbias, f.dbias_size, acc);
  if (o.z) testing::close("dz", dz.values(), f.dz, f.dz_size, o.dtype);
}

const testing::Case kDTypes("every dtype of inputs and sums", [] {
  for (const DType half : {DType::bfloat16, DType::float16})
    for (const DType residual : {half, DType::float32})
      for (const DType total : {half, DType::float32}) {
        Options o;
        o.dtype = half, o.residual_dtype = residual, o.total_dtype = total;
        run(o);
      }
  Options o;
  o.dtype = o.residual_dtype = o.total_dtype = DType::float64;
  run(o);
});

const testing::Case kShapes("odd sizes, groups, options", [] {
  for (const std::int64_t group : {1, 3, 16, 33, 300})
    for (const std::int64_t groups : {1, 3})
      for (const std::int64_t rows : {0, 1, 9}) {
        Options o;
        o.rows = rows, o.group = group, o.dim = group * groups, o.threads = 2;
        run(o);
        o.gate_after = false;
        run(o);
        o.residual = o.bias = false;
        run(o);
        o.z = false;
        run(o);
      }
});

const testing::Case kThreads("rows enough for several threads", [] {
  Options o;
  o.rows = 700, o.threads = 3;
  run(o);
});

}  // namespace
