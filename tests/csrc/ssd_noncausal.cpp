// ssd_noncausal and its gradients against S = sum w x B^T, y = S C + D x with w = -dt A.
#include "cpu/ssd_noncausal.h"

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Numbers = std::vector<double>;

struct Options {
  std::int64_t batch = 2, seqlen = 70, nheads = 2, headdim = 21, dstate = 16, groups = 1;
  DType dtype = DType::float32;
  bool softplus = true, D = true, dt_bias = true, outer = true, interleaved = false, pads = false;
  std::vector<std::int64_t> offsets;
  int threads = 1;
};

// One sum, and the sum of the sizes of its terms, which its rounding is relative to.
struct Sums {
  Numbers value, size;
  explicit Sums(std::int64_t count) : value(count, 0.0), size(count, 0.0) {}
  void add(std::int64_t at, double term) { value[at] += term, size[at] += std::fabs(term); }
};

void run(const Options& o) {
  const std::int64_t rows = o.batch * o.seqlen, H = o.nheads, P = o.headdim, N = o.dstate, G = o.groups, dim = H * P;
  const std::int64_t nseq = o.offsets.empty() ? o.batch : static_cast<std::int64_t>(o.offsets.size()) - 1;
  const DType acc = o.dtype == DType::float64 ? DType::float64 : DType::float32;
  Tensor x(o.dtype, rows, dim, dim + 3), dt(o.dtype, rows, H, H + 1), B(o.dtype, rows, G * N, G * N + 5);
  Tensor C(o.dtype, rows, G * N), dy(o.dtype, rows, dim, dim + 2), y(o.dtype, rows, dim);
  Tensor A(acc, 1, H), D(acc, 1, dim), bias(acc, 1, H), state(acc, nseq * dim, N), outer(acc, nseq * dim, N);
  Tensor dx(o.dtype, rows, dim), ddt(o.dtype, rows, H), dB(o.dtype, rows, G * N), dC(o.dtype, rows, G * N);
  Tensor dA(acc, 1, H), dD(acc, 1, dim), dbias(acc, 1, H);
  for (Tensor* tensor : {&x, &B, &C, &D, &dy, &outer}) tensor->random(1.0);
  A.random(1.0, -1.5), dt.random(0.4, 0.5), bias.random(0.1);
  std::vector<std::uint8_t> flags(rows, 0);
  if (o.pads)
    for (std::int64_t i = 0; i < rows; i += 3) flags[i] = 2;

  SsdNoncausalForward f;
  f.dtype = o.dtype, f.dt_softplus = o.softplus, f.interleaved = o.interleaved, f.threads = o.threads;
  f.batch = o.batch, f.seqlen = o.seqlen, f.nheads = H, f.headdim = P, f.ngroups = G, f.dstate = N, f.nseq = nseq;
  f.x = x.data(), f.dt = dt.data(), f.B = B.data(), f.C = C.data(), f.A = A.data();
  f.D = o.D ? D.data() : nullptr, f.dt_bias = o.dt_bias ? bias.data() : nullptr;
  f.flags = o.pads ? flags.data() : nullptr, f.cu_seqlens = o.offsets.empty() ? nullptr : o.offsets.data();
  f.x_stride = x.stride(), f.dt_stride = dt.stride(), f.B_stride = B.stride(), f.C_stride = C.stride();
  f.y = y.data(), f.state = state.data();
  SSMKIT_CPU(ssd_noncausal_forward)(f);
  SsdNoncausalBackward b;
  static_cast<SsdNoncausalParams&>(b) = f;
  b.dy = dy.data(), b.dfinal = o.outer ? outer.data() : nullptr, b.state = state.data(), b.dy_stride = dy.stride();
  b.dx = dx.data(), b.ddt = ddt.data(), b.dB = dB.data(), b.dC = dC.data(), b.dA = dA.data();
  b.dD = o.D ? dD.data() : nullptr, b.ddt_bias = o.dt_bias ? dbias.data() : nullptr;
  SSMKIT_CPU(ssd_noncausal_backward)(b);

  const Numbers xs = x.values(), dts = dt.values(), Bs = B.values(), Cs = C.values(), As = A.values(), Ds = D.values();
  const Numbers biases = bias.values(), dys = dy.values(), outers = outer.values();
  Sums S(nseq * dim * N), dS(nseq * dim * N), y_(rows * dim), dx_(rows * dim), ddt_(rows * H), dB_(rows * G * N);
  Sums dC_(rows * G * N), dA_(H), dD_(dim), dbias_(H);
  // each (token, head) in turn: its sequence, its weight, the derivative of dt
  const auto tokens = [&](const auto& visit) {
    for (std::int64_t row = 0; row < rows; ++row) {
      if (flags[row]) continue;
      std::int64_t s = row / (o.seqlen ? o.seqlen : 1);
      if (!o.offsets.empty())
        for (s = 0; row >= o.offsets[s + 1];) ++s;
      for (std::int64_t head = 0; head < H; ++head) {
        double step = dts[row * H + head] + (o.dt_bias ? biases[head] : 0.0), slope = 1.0;
        if (o.softplus) slope = 1 / (1 + std::exp(-step)), step = std::log1p(std::exp(step));
        visit(row, s, head, o.interleaved ? head % G : head / (H / G), step, slope);
      }
    }
  };
  if (o.outer)
    for (std::size_t i = 0; i < outers.size(); ++i) dS.add(i, outers[i]);
  tokens([&](std::int64_t row, std::int64_t s, std::int64_t head, std::int64_t group, double step, double) {
    for (std::int64_t c = 0; c < P; ++c)
      for (std::int64_t n = 0; n < N; ++n) {
        const std::int64_t at = (s * dim + head * P + c) * N + n, channel = row * dim + head * P + c;
        S.add(at, -step * As[head] * xs[channel] * Bs[(row * G + group) * N + n]);
        dS.add(at, dys[channel] * Cs[(row * G + group) * N + n]);
      }
  });
  tokens([&](std::int64_t row, std::int64_t s, std::int64_t head, std::int64_t group, double step, double slope) {
    const double w = -step * As[head];
    for (std::int64_t c = 0; c < P; ++c) {
      const std::int64_t channel = row * dim + head * P + c;
      if (o.D) {
        y_.add(channel, Ds[head * P + c] * xs[channel]), dx_.add(channel, Ds[head * P + c] * dys[channel]);
        dD_.add(head * P + c, dys[channel] * xs[channel]);
      }
      for (std::int64_t n = 0; n < N; ++n) {
        const std::int64_t at = (s * dim + head * P + c) * N + n, weight = (row * G + group) * N + n;
        const double through = dS.value[at] * Bs[weight], size = dS.size[at] * std::fabs(Bs[weight]);
        y_.add(channel, S.value[at] * Cs[weight]), y_.size[channel] += S.size[at] * std::fabs(Cs[weight]);
        dx_.add(channel, w * through), dx_.size[channel] += w * size;
        dB_.add(weight, w * xs[channel] * dS.value[at]), dB_.size[weight] += std::fabs(w * xs[channel]) * dS.size[at];
        dC_.add(weight, dys[channel] * S.value[at]), dC_.size[weight] += std::fabs(dys[channel]) * S.size[at];
        const double dw = through * xs[channel], dw_size = size * std::fabs(xs[channel]);
        ddt_.add(row * H + head, -As[head] * slope * dw), ddt_.size[row * H + head] -= As[head] * slope * dw_size;
        dA_.add(head, -step * dw), dA_.size[head] += step * dw_size;
        dbias_.add(head, -As[head] * slope * dw), dbias_.size[head] -= As[head] * slope * dw_size;
      }
    }
  });
  testing::close("y", y.values(), y_.value, y_.size, o.dtype);
  testing::close("state", state.values(), S.value, S.size, acc);
  testing::close("dx", dx.values(), dx_.value, dx_.size, o.dtype);
  testing::close("ddt", ddt.values(), ddt_.value, ddt_.size, o.dtype);
  testing::close("dB", dB.values(), dB_.value, dB_.size, o.dtype);
  testing::close("dC", dC.values(), dC_.value, dC_.size, o.dtype);
  testing::close("dA", dA.values(), dA_.value, dA_.size, acc);
  if (o.D) testing::close("dD", dD.values(), dD_.value, dD_.size, acc);
  if (o.dt_bias) testing::close("ddt_bias", dbias.values(), dbias_.value, dbias_.size, acc);
}

const testing::Case kDTypes("every dtype", [] {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16, DType::float64}) {
    Options o;
    o.dtype = dtype, run(o);
    o.pads = true, run(o);
  }
});

const testing::Case kShapes("odd sizes, groups, pads", [] {
  for (const std::int64_t headdim : {1, 33})
    for (const std::int64_t dstate : {1, 35})
      for (const std::int64_t seqlen : {1, 65}) {
        Options o;
        o.nheads = 6, o.groups = 3, o.headdim = headdim, o.dstate = dstate, o.seqlen = seqlen, o.threads = 2;
        run(o);
        o.interleaved = o.pads = true, o.softplus = o.D = o.dt_bias = o.outer = false;
        run(o);
      }
});

const testing::Case kLong("more than one partial state, more threads than there is work", [] {
  Options o;
  o.batch = 1, o.seqlen = 530, o.headdim = 5, o.threads = 9;
  run(o);
});

const testing::Case kPacked("packed sequences, some of them empty", [] {
  Options o;
  o.batch = 1, o.seqlen = 400, o.headdim = 5, o.offsets = {0, 0, 64, 65, 65, 329, 400, 400}, o.threads = 2;
  run(o);
});

}  // namespace
