// ssd against its recurrence written out in double, one head and token at a time, all gradients included.
#include "cpu/ssd.h"

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Numbers = std::vector<double>;

struct Shape {
  std::int64_t batch, seqlen, nheads, headdim, ngroups, dstate;
};

struct Options {
  DType dtype = DType::float32;
  bool D = true, z = true, bias = true, initial = true, softplus = true, reverse = false, wide = false, addend = false;
  double dt_min = 0.0, dt_max = HUGE_VAL;
  std::vector<std::int64_t> cu_seqlens;
  std::vector<std::uint8_t> flags;
  std::int64_t padding = 0;  // numbers between the rows of the inputs
  int threads = 1, chunk = 64;
};

// A sum over tokens or channels, and of the absolute values of its terms: the measure of its rounding errors.
struct Sum {
  explicit Sum(std::int64_t count) : value(count), size(count) {}
  void add(std::int64_t i, double term) { value[i] += term, size[i] += std::fabs(term); }
  Numbers value, size;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }

// Every tensor of a call, and the naive computation on the same rounded numbers.
class Call {
 public:
  Call(const Shape& shape, const Options& options)
      : s(shape), o(options), real(o.dtype == DType::float64 ? DType::float64 : DType::float32),
        out(o.wide ? real : o.dtype), rows(s.batch * s.seqlen), inner(s.nheads * s.headdim), width(s.ngroups * s.dstate),
        nseq(o.cu_seqlens.empty() ? s.batch : static_cast<std::int64_t>(o.cu_seqlens.size()) - 1),
        slots(o.cu_seqlens.empty() ? s.batch * ((s.seqlen + o.chunk - 1) / o.chunk) : s.seqlen / o.chunk + nseq),
        x(o.dtype, rows, inner, inner + o.padding), dt(o.dtype, rows, s.nheads, s.nheads + 2 * o.padding),
        B(o.dtype, rows, width, width + o.padding), C(o.dtype, rows, width, width + 3 * o.padding),
        z(o.dtype, rows, inner, inner + 2 * o.padding), dy(o.dtype, rows, inner, inner + o.padding),
        A(real, 1, s.nheads), D(real, s.nheads, s.headdim), bias(real, 1, s.nheads),
        initial(real, nseq * inner, s.dstate), dfinal(real, nseq * inner, s.dstate), addend(real, rows, inner),
        y(out, rows, inner), ungated(real, rows, inner), final_state(real, nseq * inner, s.dstate),
        checkpoints(real, slots * s.nheads * s.dstate, s.headdim), dx(out, rows, inner), ddt(out, rows, s.nheads),
        dB(out, rows, width), dC(out, rows, width), dz(out, rows, inner), dA(real, 1, s.nheads),
        dD(real, s.nheads, s.headdim), dbias(real, 1, s.nheads), dinitial(real, nseq * inner, s.dstate) {
    for (Tensor* tensor : {&x, &B, &C, &z, &dy, &D, &initial, &dfinal, &addend}) tensor->random(1.0);
    dt.random(o.softplus ? 2.0 : 0.1, o.softplus ? -1.0 : 0.15);
    bias.random(o.softplus ? 0.5 : 0.05, o.softplus ? -1.0 : 0.1);
    A.random(0.5, -0.6);
  }

  void run() {
    SsdForward f{};
    set(f);
    f.addend = o.addend ? addend.data() : nullptr, f.y = y.data(), f.final_state = final_state.data();
    f.checkpoints = checkpoints.data(), f.ungated = o.z ? ungated.data() : nullptr;
    SSMKIT_CPU_BF16(ssd_forward)(f);

    SsdBackward b{};
    set(b);
    b.dy = dy.data(), b.dy_stride = dy.stride(), b.dfinal_state = dfinal.data(), b.checkpoints = checkpoints.data();
    b.ungated = o.z ? ungated.data() : nullptr, b.dz = o.z ? dz.data() : nullptr;
    b.dx = dx.data(), b.ddt = ddt.data(), b.dB = dB.data(), b.dC = dC.data(), b.dA = dA.data();
    b.dD = o.D ? dD.data() : nullptr, b.ddt_bias = o.bias ? dbias.data() : nullptr;
    b.dinitial_state = o.initial ? dinitial.data() : nullptr;
    SSMKIT_CPU_BF16(ssd_backward)(b);
    compare();
  }

 private:
  void set(SsdParams& p) const {
    p.dtype = o.dtype, p.dt_softplus = o.softplus, p.reverse = o.reverse, p.wide = o.wide;
    p.threads = o.threads, p.chunk = o.chunk, p.batch = s.batch, p.seqlen = s.seqlen, p.nheads = s.nheads;
    p.headdim = s.headdim, p.ngroups = s.ngroups, p.dstate = s.dstate, p.nseq = nseq;
    p.dt_min = o.dt_min, p.dt_max = o.dt_max;
    p.x = x.data(), p.dt = dt.data(), p.B = B.data(), p.C = C.data(), p.z = o.z ? z.data() : nullptr, p.A = A.data();
    p.D = o.D ? D.data() : nullptr, p.dt_bias = o.bias ? bias.data() : nullptr;
    p.initial_state = o.initial ? initial.data() : nullptr;
    p.flags = o.flags.empty() ? nullptr : o.flags.data();
    p.cu_seqlens = o.cu_seqlens.empty() ? nullptr : o.cu_seqlens.data();
    p.x_stride = x.stride(), p.dt_stride = dt.stride(), p.B_stride = B.stride(), p.C_stride = C.stride();
    p.z_stride = z.stride();
  }

  void check(const char* name, const Tensor& tensor, const Numbers& expected) const {
    check(name, tensor, expected, expected);
  }
  void check(const char* name, const Tensor& tensor, const Sum& sum) const { check(name, tensor, sum.value, sum.size); }
  void check(const char* name, const Tensor& tensor, const Numbers& expected, const Numbers& size) const {
    // operands of products in bfloat16 are rounded to it, so that results in float carry its rounding too
    const bool rounded = o.dtype == DType::bfloat16 && cpu_capability() == Capability::avx512_bf16;
    // 4x in double: a decay's exponent is a sum over its chunk, whose rounding is amplified by its size, some 20
    testing::close(std::string(name) + " " + describe(), tensor.values(), expected, size,
                   rounded ? DType::bfloat16 : tensor.dtype(), o.dtype == DType::float64 ? 4.0 : 1.0);
  }

  std::string describe() const {
    std::string text;
    for (std::int64_t size : {s.batch, s.seqlen, s.nheads, s.headdim, s.ngroups, s.dstate})
      text += std::to_string(size) + " ";
    return "(" + text + ") chunk " + std::to_string(o.chunk) + " dtype " + std::to_string(static_cast<int>(o.dtype)) +
           (o.reverse ? " reverse" : "");
  }

  void compare() const {
    const Numbers x_ = x.values(), dt_ = dt.values(), B_ = B.values(), C_ = C.values(), z_ = z.values();
    const Numbers dy_ = dy.values(), A_ = A.values(), D_ = D.values(), bias_ = bias.values(), addend_ = addend.values();
    const Numbers initial_ = initial.values(), dfinal_ = dfinal.values();
    const std::int64_t P = s.headdim, N = s.dstate;
    Numbers ey(rows * inner), eungated(ey.size()), edx(ey.size()), edz(ey.size()), eddt(rows * s.nheads);
    Numbers efinal(initial_.size()), einitial(initial_.size());
    Sum eA(s.nheads), eB(rows * width), eC(rows * width), eD(inner), ebias(s.nheads);
    for (std::int64_t q = 0; q < nseq; ++q)
      for (std::int64_t head = 0; head < s.nheads; ++head) {
        const std::int64_t first = o.cu_seqlens.empty() ? q * s.seqlen : o.cu_seqlens[q];
        const std::int64_t length = o.cu_seqlens.empty() ? s.seqlen : o.cu_seqlens[q + 1] - first;
        const std::int64_t group = head / (s.nheads / s.ngroups), state_at = (q * s.nheads + head) * P * N;
        const auto row_at = [&](std::int64_t p) { return first + (o.reverse ? length - 1 - p : p); };
        const auto flag = [&](std::int64_t row) { return o.flags.empty() ? 0 : o.flags[row]; };
        const auto raw = [&](std::int64_t row) { return dt_[row * s.nheads + head] + (o.bias ? bias_[head] : 0.0); };
        const auto free = [&](std::int64_t row) { return o.softplus ? std::log1p(std::exp(raw(row))) : raw(row); };
        const auto step = [&](std::int64_t row) { return std::fmin(std::fmax(free(row), o.dt_min), o.dt_max); };
        std::vector<Numbers> h(length + 1, Numbers(P * N));
        for (std::int64_t i = 0; i < P * N; ++i) h[0][i] = o.initial ? initial_[state_at + i] : 0.0;
        for (std::int64_t p = 0; p < length; ++p) {
          const std::int64_t row = row_at(p);
          h[p + 1] = h[p];
          if (flag(row) & 1) h[p + 1].assign(P * N, 0.0);
          if (flag(row) & 2) continue;
          const double delta = step(row), decay = std::exp(delta * A_[head]);
          const double *b = B_.data() + row * width + group * N, *c = C_.data() + row * width + group * N;
          for (std::int64_t i = 0; i < P; ++i) {
            const std::int64_t at = row * inner + head * P + i;
            double total = (o.D ? D_[head * P + i] * x_[at] : 0.0) + (o.addend ? addend_[at] : 0.0);
            for (std::int64_t n = 0; n < N; ++n) {
              double& state = h[p + 1][i * N + n];
              state = decay * state + delta * x_[at] * b[n];
              total += state * c[n];
            }
            eungated[at] = total;
            ey[at] = o.z ? total * silu(z_[at]) : total;
            const double gate = sigmoid(z_[at]);
            edz[at] = dy_[at] * total * gate * (1 + z_[at] * (1 - gate));
          }
        }
        Numbers g(P * N);
        for (std::int64_t i = 0; i < P * N; ++i) efinal[state_at + i] = h[length][i], g[i] = dfinal_[state_at + i];
        for (std::int64_t p = length; p-- > 0;) {
          const std::int64_t row = row_at(p);
          if (!(flag(row) & 2)) {
            const double delta = step(row), decay = std::exp(delta * A_[head]);
            const std::int64_t at_group = row * width + group * N;
            double through_x = 0, through_decay = 0;
            for (std::int64_t i = 0; i < P; ++i) {
              const std::int64_t at = row * inner + head * P + i;
              const double e = dy_[at] * (o.z ? silu(z_[at]) : 1.0);
              double du = 0;
              for (std::int64_t n = 0; n < N; ++n) {
                const double before = flag(row) & 1 ? 0.0 : h[p][i * N + n];
                double& gradient = g[i * N + n];
                gradient += e * C_[at_group + n];
                eC.add(at_group + n, e * h[p + 1][i * N + n]);
                eB.add(at_group + n, gradient * delta * x_[at]);
                du += gradient * B_[at_group + n];
                gradient *= decay;
                through_decay += gradient * before;
              }
              edx[at] = delta * du + (o.D ? D_[head * P + i] * e : 0.0);
              through_x += du * x_[at];
              eD.add(head * P + i, e * x_[at]);
            }
            const bool inside = free(row) >= o.dt_min && free(row) <= o.dt_max;
            const double slope = !inside ? 0.0 : o.softplus ? sigmoid(raw(row)) : 1.0;
            eddt[row * s.nheads + head] = (through_x + A_[head] * through_decay) * slope;
            eA.add(head, delta * through_decay);
            ebias.add(head, through_x * slope), ebias.add(head, A_[head] * through_decay * slope);
          }
          if (flag(row) & 1) g.assign(P * N, 0.0);
        }
        for (std::int64_t i = 0; i < P * N; ++i) einitial[state_at + i] = g[i];
      }
    check("y", y, ey), check("final_state", final_state, efinal), check("dx", dx, edx), check("ddt", ddt, eddt);
    check("dA", dA, eA), check("dB", dB, eB), check("dC", dC, eC);
    if (o.z && o.flags.empty()) check("ungated", ungated, eungated);
    if (o.z) check("dz", dz, edz);
    if (o.D) check("dD", dD, eD);
    if (o.bias) check("ddt_bias", dbias, ebias);
    if (o.initial) check("dinitial_state", dinitial, einitial);
  }

  const Shape s;
  const Options o;
  const DType real, out;
  const std::int64_t rows, inner, width, nseq, slots;
  Tensor x, dt, B, C, z, dy, A, D, bias, initial, dfinal, addend;
  Tensor y, ungated, final_state, checkpoints, dx, ddt, dB, dC, dz, dA, dD, dbias, dinitial;
};

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

// Every tile that can be left over, odd numbers of everything, rows with gaps between them.
const testing::Case kShapes("shapes and dtypes", [] {
  for (DType dtype : kDTypes)
    for (const Shape& shape : {Shape{2, 3, 1, 1, 1, 1}, Shape{1, 65, 4, 33, 2, 7}, Shape{2, 64, 2, 16, 1, 17},
                               Shape{1, 29, 3, 7, 3, 35}, Shape{1, 130, 2, 19, 1, 6}}) {
      Options o;
      o.dtype = dtype, o.padding = shape.headdim % 2 ? 3 : 0, o.threads = 2;
      Call(shape, o).run();
    }
});

const testing::Case kChunks("chunks of every length", [] {
  for (DType dtype : {DType::float32, DType::bfloat16})
    for (int chunk : {1, 7, 16, 33, 256}) {
      Options o;
      o.dtype = dtype, o.chunk = chunk, o.threads = 2;
      for (int i = 0; i < 2 * 75; ++i) o.flags.push_back(static_cast<std::uint8_t>(i % 13 == 5 ? 1 : i % 11 == 3 ? 2 : 0));
      Call({2, 75, 2, 9, 1, 6}, o).run();
    }
});

const testing::Case kEmpty("empty batch, sequence, heads, states", [] {
  for (const Shape& shape : {Shape{0, 7, 2, 3, 1, 3}, Shape{2, 0, 2, 3, 1, 3}, Shape{1, 4, 0, 3, 1, 3},
                             Shape{1, 4, 2, 3, 1, 0}}) {
    Options o;
    o.threads = 3;
    Call(shape, o).run();
  }
  Options packed;
  packed.cu_seqlens = {0, 0, 0}, packed.threads = 5;
  Call({1, 0, 2, 5, 1, 3}, packed).run();
});

const testing::Case kOptions("each option", [] {
  const auto with = [](auto change, Shape shape) {
    for (DType dtype : {DType::float32, DType::bfloat16}) {
      Options o;
      o.dtype = dtype;
      change(o);
      Call(shape, o).run();
    }
  };
  with([](Options& o) { o.D = o.z = o.bias = o.initial = false; }, {2, 70, 3, 9, 1, 4});
  with([](Options& o) { o.softplus = false; }, {2, 20, 2, 9, 2, 4});
  with([](Options& o) { o.dt_min = 0.1, o.dt_max = 0.3; }, {2, 20, 2, 9, 1, 4});
  with([](Options& o) { o.reverse = true; }, {2, 70, 4, 9, 2, 4});
  with([](Options& o) { o.addend = o.wide = true; }, {2, 70, 2, 9, 1, 4});
});

const testing::Case kWalks("packed, restarts and pads", [] {
  for (DType dtype : {DType::float32, DType::bfloat16})
    for (bool reverse : {false, true}) {
      Options o;
      o.dtype = dtype, o.reverse = reverse, o.threads = 3;
      o.cu_seqlens = {0, 0, 3, 70, 71, 200};
      Call({1, 200, 4, 5, 2, 4}, o).run();
      for (int i = 0; i < 200; ++i) o.flags.push_back(static_cast<std::uint8_t>(i * 7 % 5 == 0 ? i % 4 : 0));
      for (int i = 0; i < 70; ++i) o.flags[i] = 2;
      o.flags[69] = 3;
      Call({1, 200, 4, 5, 2, 4}, o).run();
      o.cu_seqlens.clear();
      Call({2, 100, 4, 5, 2, 4}, o).run();
    }
});

const testing::Case kFewHeads("more threads than heads: the length is cut", [] {
  for (DType dtype : {DType::float32, DType::bfloat16})
    for (bool reverse : {false, true}) {
      Options o;
      o.dtype = dtype, o.threads = 12, o.reverse = reverse, o.chunk = 16;
      Call({1, 300, 1, 5, 1, 4}, o).run();
      Call({1, 270, 5, 3, 1, 6}, o).run();
      Call({1, 10, 3, 3, 3, 6}, o).run();
      for (int i = 0; i < 300; ++i) o.flags.push_back(static_cast<std::uint8_t>(i % 97 == 5 ? 1 : i % 11 == 3 ? 2 : 0));
      Call({1, 300, 2, 5, 1, 4}, o).run();
      o.cu_seqlens = {0, 120, 120, 280, 300};
      o.threads = 40;
      Call({1, 300, 4, 5, 2, 4}, o).run();
    }
});

// Rows 2^30 numbers apart: the fourth begins beyond 2^31.
const testing::Case kWideRows("row strides beyond 2^31", [] {
  constexpr std::int64_t stride = (std::int64_t{1} << 30) + 1, rows = 4, width = 16;
  testing::Sparse memory(((rows - 1) * stride + width) * sizeof(float));
  if (!memory) return std::puts("(skipped: the system grants no such address space)"), void();
  float* wide = memory.as<float>();
  Tensor near(DType::float32, rows, width), A(DType::float32, 1, 1), y(DType::float32, rows, 2);
  Tensor final_state(DType::float32, 2, 3), checkpoints(DType::float32, 2 * 3, 2), ungated(DType::float32, rows, 2);
  Tensor dx(DType::float32, rows, 2), ddt(DType::float32, rows, 1), dz(DType::float32, rows, 2), dA(DType::float32, 1, 1);
  Tensor dB(DType::float32, rows, 3), dC(DType::float32, rows, 3);
  A.random(0.5, -0.6), near.random(1.0);
  for (std::int64_t row = 0; row < rows; ++row)
    std::memcpy(wide + row * stride, static_cast<float*>(near.data()) + row * width, width * sizeof(float));
  const auto call = [&](const float* base, std::int64_t step) {
    SsdForward f{};
    f.dtype = DType::float32, f.dt_softplus = true, f.threads = 1, f.chunk = 2;
    f.batch = 1, f.seqlen = rows, f.nheads = 1, f.headdim = 2, f.ngroups = 1, f.dstate = 3, f.nseq = 1;
    f.dt_max = HUGE_VAL;
    f.x = base, f.dt = base + 2, f.z = base + 3, f.A = A.data(), f.B = base + 5, f.C = base + 8;
    f.x_stride = f.dt_stride = f.z_stride = f.B_stride = f.C_stride = step;
    f.y = y.data(), f.final_state = final_state.data(), f.checkpoints = checkpoints.data(), f.ungated = ungated.data();
    SSMKIT_CPU_BF16(ssd_forward)(f);
    SsdBackward b{};
    static_cast<SsdParams&>(b) = f;
    b.checkpoints = checkpoints.data(), b.ungated = ungated.data(), b.dy = base + 11, b.dy_stride = step;
    b.dx = dx.data(), b.ddt = ddt.data(), b.dz = dz.data(), b.dA = dA.data(), b.dB = dB.data(), b.dC = dC.data();
    SSMKIT_CPU_BF16(ssd_backward)(b);
    Numbers all;
    for (const Tensor* tensor : {&y, &final_state, &dx, &ddt, &dz, &dA, &dB, &dC})
      for (double value : tensor->values()) all.push_back(value);
    return all;
  };
  const Numbers expected = call(static_cast<float*>(near.data()), width);
  if (call(wide, stride) != expected) testing::fail("rows far apart give other numbers");
});

}  // namespace
