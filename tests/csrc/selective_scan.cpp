// selective_scan against the equations written out with complex numbers in double, all gradients included.
#include "cpu/selective_scan.h"

#include <complex>

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Number = std::complex<double>;
using Numbers = std::vector<Number>;

struct Shape {
  std::int64_t batch, seqlen, dim, dstate;
};

struct Options {
  DType dtype = DType::float32;
  bool complex = false, D = true, z = true, bias = true, initial = true, softplus = true, reverse = false;
  std::int64_t B_groups = 1, C_groups = 1;
  std::vector<std::int64_t> cu_seqlens;
  std::vector<std::int32_t> order;
  std::vector<std::uint8_t> flags;
  std::int64_t padding = 0;  // numbers between the rows of the inputs
  int threads = 1;
};

// A sum over tokens or channels, and of the absolute values of its terms: the measure of its rounding errors.
struct Sum {
  explicit Sum(std::int64_t count) : value(count), size(count) {}
  void add(std::int64_t i, Number term) { value[i] += term, size[i] += std::abs(term); }
  Numbers value;
  std::vector<double> size;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }

// Every tensor of a call, and the naive computation on the same rounded numbers.
class Call {
 public:
  Call(const Shape& shape, const Options& options)
      : s(shape), o(options), real(o.dtype == DType::float64 ? DType::float64 : DType::float32),
        state(!o.complex ? real : real == DType::float64 ? DType::complex128 : DType::complex64),
        weight(o.complex ? state : o.dtype), rows(s.batch * s.seqlen),
        nseq(o.cu_seqlens.empty() ? s.batch : static_cast<std::int64_t>(o.cu_seqlens.size()) - 1),
        slots(o.cu_seqlens.empty() ? s.batch * ((s.seqlen + 63) / 64) : s.seqlen / 64 + nseq),
        x(o.dtype, rows, s.dim, s.dim + o.padding), dt(o.dtype, rows, s.dim, s.dim + 2 * o.padding),
        z(o.dtype, rows, s.dim, s.dim + o.padding), dy(o.dtype, rows, s.dim, s.dim + 3 * o.padding),
        A(state, s.dim, s.dstate), B(weights(o.B_groups)), C(weights(o.C_groups)), D(real, 1, s.dim),
        bias(real, 1, s.dim), initial(state, nseq * s.dim, s.dstate), dfinal(state, nseq * s.dim, s.dstate),
        y(o.dtype, rows, s.dim), final_state(state, nseq * s.dim, s.dstate),
        checkpoints(state, slots * s.dstate, s.dim), dx(o.dtype, rows, s.dim), ddt(o.dtype, rows, s.dim),
        dz(o.dtype, rows, s.dim), dA(state, s.dim, s.dstate), dB(gradient(o.B_groups)), dC(gradient(o.C_groups)),
        dD(real, 1, s.dim), dbias(real, 1, s.dim), dinitial(state, nseq * s.dim, s.dstate) {
    for (Tensor* tensor : {&x, &z, &dy, &B, &C, &D, &initial, &dfinal}) tensor->random(1.0);
    dt.random(o.softplus ? 2.0 : 0.1, o.softplus ? -1.0 : 0.15);
    bias.random(o.softplus ? 0.5 : 0.05, o.softplus ? -1.0 : 0.1);
    A.random(0.5, -0.6);
  }

  void run() {
    SelectiveScanForward f;
    set(f);
    f.y = y.data(), f.y_stride = s.dim, f.final_state = final_state.data(), f.checkpoints = checkpoints.data();
    SSMKIT_CPU(selective_scan_forward)(f);

    SelectiveScanBackward b;
    set(b);
    b.checkpoints = checkpoints.data(), b.dy = dy.data(), b.dfinal_state = dfinal.data(), b.dy_stride = dy.stride();
    b.ddt_stride = s.dim, b.dB_stride = o.B_groups * s.dstate, b.dC_stride = o.C_groups * s.dstate;
    b.dx = dx.data(), b.ddt = ddt.data(), b.dz = o.z ? dz.data() : nullptr, b.dA = dA.data(), b.dB = dB.data();
    b.dC = dC.data(), b.dD = o.D ? dD.data() : nullptr, b.ddt_bias = o.bias ? dbias.data() : nullptr;
    b.dinitial_state = o.initial ? dinitial.data() : nullptr;
    SSMKIT_CPU(selective_scan_backward)(b);
    compare();
  }

 private:
  Tensor weights(std::int64_t groups) const {
    if (!groups) return Tensor(state, s.dim, s.dstate);
    return Tensor(weight, rows, groups * s.dstate, groups * s.dstate + o.padding);
  }
  Tensor gradient(std::int64_t groups) const {
    if (!groups) return Tensor(state, s.dim, s.dstate);
    return Tensor(weight, rows, groups * s.dstate);
  }

  void set(SelectiveScanParams& p) const {
    p.dtype = o.dtype, p.complex_state = o.complex, p.dt_softplus = o.softplus, p.reverse = o.reverse;
    p.threads = o.threads, p.batch = s.batch, p.seqlen = s.seqlen, p.dim = s.dim, p.dstate = s.dstate, p.nseq = nseq;
    p.B_groups = o.B_groups, p.C_groups = o.C_groups;
    p.x = x.data(), p.dt = dt.data(), p.z = o.z ? z.data() : nullptr, p.A = A.data(), p.B = B.data();
    p.C = C.data(), p.D = o.D ? D.data() : nullptr, p.dt_bias = o.bias ? bias.data() : nullptr;
    p.initial_state = o.initial ? initial.data() : nullptr;
    p.order = o.order.empty() ? nullptr : o.order.data();
    p.flags = o.flags.empty() ? nullptr : o.flags.data();
    p.cu_seqlens = o.cu_seqlens.empty() ? nullptr : o.cu_seqlens.data();
    p.x_stride = x.stride(), p.dt_stride = dt.stride(), p.z_stride = z.stride();
    p.B_stride = B.stride(), p.C_stride = C.stride();
  }

  Numbers numbers(const Tensor& tensor) const {
    const std::vector<double> values = tensor.values();
    const bool complex = tensor.dtype() == DType::complex64 || tensor.dtype() == DType::complex128;
    Numbers result;
    for (std::size_t i = 0; i < values.size(); i += complex ? 2 : 1)
      result.emplace_back(values[i], complex ? values[i + 1] : 0.0);
    return result;
  }

  void check(const char* name, const Tensor& tensor, const Numbers& expected) const {
    std::vector<double> size;
    for (const Number& number : expected) size.push_back(std::abs(number));
    check(name, tensor, expected, size);
  }
  void check(const char* name, const Tensor& tensor, const Sum& sum) const { check(name, tensor, sum.value, sum.size); }
  void check(const char* name, const Tensor& tensor, const Numbers& expected, const std::vector<double>& size) const {
    const bool complex = tensor.dtype() == DType::complex64 || tensor.dtype() == DType::complex128;
    std::vector<double> parts, sizes;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      parts.push_back(expected[i].real()), sizes.push_back(size[i]);
      if (complex) parts.push_back(expected[i].imag()), sizes.push_back(size[i]);
    }
    testing::close(std::string(name) + " " + describe(), tensor.values(), parts, sizes, tensor.dtype());
  }

  std::string describe() const {
    return "(" + std::to_string(s.batch) + "," + std::to_string(s.seqlen) + "," + std::to_string(s.dim) + "," +
           std::to_string(s.dstate) + ") dtype " + std::to_string(static_cast<int>(o.dtype));
  }

  std::vector<std::int64_t> walk(std::int64_t sequence) const {
    std::vector<std::int64_t> visited;
    const std::int64_t begin = o.cu_seqlens.empty() ? sequence * s.seqlen : o.cu_seqlens[sequence];
    const std::int64_t length = o.cu_seqlens.empty() ? s.seqlen : o.cu_seqlens[sequence + 1] - begin;
    for (std::int64_t p = 0; p < length; ++p) {
      const std::int64_t at = o.reverse ? length - 1 - p : p;
      visited.push_back(begin + (o.order.empty() ? at : o.order[at]));
    }
    return visited;
  }

  void compare() const {
    const Numbers x_ = numbers(x), dt_ = numbers(dt), z_ = numbers(z), dy_ = numbers(dy), A_ = numbers(A);
    const Numbers B_ = numbers(B), C_ = numbers(C), D_ = numbers(D), bias_ = numbers(bias);
    const Numbers initial_ = numbers(initial), dfinal_ = numbers(dfinal);
    const std::int64_t N = s.dstate;
    const double pair = o.complex ? 2.0 : 1.0;  // y = pair Re(C.h)
    Numbers ey(rows * s.dim), edx(ey.size()), eddt(ey.size()), edz(ey.size());
    Sum eA(A_.size()), eB(B_.size()), eC(C_.size()), eD(s.dim), ebias(s.dim);
    Numbers efinal(initial_.size()), einitial(initial_.size());
    for (std::int64_t q = 0; q < nseq; ++q)
      for (std::int64_t d = 0; d < s.dim; ++d) {
        const std::vector<std::int64_t> visited = walk(q);
        const std::size_t length = visited.size();
        const auto at_B = [&](std::int64_t row) {
          return o.B_groups ? (row * o.B_groups + d / (s.dim / o.B_groups)) * N : d * N;
        };
        const auto at_C = [&](std::int64_t row) {
          return o.C_groups ? (row * o.C_groups + d / (s.dim / o.C_groups)) * N : d * N;
        };
        const auto step = [&](std::int64_t row) {
          const double raw = dt_[row * s.dim + d].real() + (o.bias ? bias_[d].real() : 0.0);
          return o.softplus ? std::log1p(std::exp(raw)) : raw;
        };
        const auto flag = [&](std::int64_t row) { return o.flags.empty() ? 0 : o.flags[row]; };
        std::vector<Numbers> h(length + 1, Numbers(N));
        for (std::int64_t n = 0; n < N; ++n) h[0][n] = o.initial ? initial_[(q * s.dim + d) * N + n] : 0.0;
        for (std::size_t p = 0; p < length; ++p) {
          const std::int64_t row = visited[p], i = row * s.dim + d;
          h[p + 1] = h[p];
          if (flag(row) & 1) h[p + 1].assign(N, 0.0);
          if (flag(row) & 2) continue;
          double y_ = o.D ? D_[d].real() * x_[i].real() : 0.0;
          for (std::int64_t n = 0; n < N; ++n) {
            h[p + 1][n] = std::exp(step(row) * A_[d * N + n]) * h[p + 1][n] + step(row) * x_[i] * B_[at_B(row) + n];
            y_ += pair * (C_[at_C(row) + n] * h[p + 1][n]).real();
          }
          ey[i] = o.z ? y_ * silu(z_[i].real()) : y_;
          if (o.z) {
            const double g = sigmoid(z_[i].real());
            edz[i] = dy_[i] * y_ * g * (1 + z_[i].real() * (1 - g));
          }
        }
        Numbers g(N);
        for (std::int64_t n = 0; n < N; ++n) {
          efinal[(q * s.dim + d) * N + n] = h[length][n];
          g[n] = dfinal_[(q * s.dim + d) * N + n];
        }
        for (std::size_t p = length; p-- > 0;) {
          const std::int64_t row = visited[p], i = row * s.dim + d;
          if (!(flag(row) & 2)) {
            const double e = dy_[i].real() * (o.z ? silu(z_[i].real()) : 1.0), delta = step(row);
            double gB = 0, qA = 0;
            for (std::int64_t n = 0; n < N; ++n) {
              const Number before = flag(row) & 1 ? Number(0) : h[p][n], a = std::exp(delta * A_[d * N + n]);
              g[n] += pair * e * std::conj(C_[at_C(row) + n]);
              eC.add(at_C(row) + n, pair * e * std::conj(h[p + 1][n]));
              eB.add(at_B(row) + n, delta * x_[i].real() * g[n]);
              gB += (std::conj(B_[at_B(row) + n]) * g[n]).real();
              g[n] *= std::conj(a);
              const Number through = std::conj(before) * g[n];
              qA += (std::conj(A_[d * N + n]) * through).real();
              eA.add(d * N + n, delta * through);
            }
            const double raw = dt_[i].real() + (o.bias ? bias_[d].real() : 0.0);
            eddt[i] = (x_[i].real() * gB + qA) * (o.softplus ? sigmoid(raw) : 1.0);
            edx[i] = delta * gB + (o.D ? D_[d].real() * e : 0.0);
            eD.add(d, e * x_[i]);
            ebias.add(d, eddt[i]);
          }
          if (flag(row) & 1) g.assign(N, 0.0);
        }
        for (std::int64_t n = 0; n < N; ++n) einitial[(q * s.dim + d) * N + n] = g[n];
      }
    check("y", y, ey), check("final_state", final_state, efinal), check("dx", dx, edx), check("ddt", ddt, eddt);
    check("dA", dA, eA), check("dB", dB, eB), check("dC", dC, eC);
    if (o.z) check("dz", dz, edz);
    if (o.D) check("dD", dD, eD);
    if (o.bias) check("ddt_bias", dbias, ebias);
    if (o.initial) check("dinitial_state", dinitial, einitial);
  }

  const Shape s;
  const Options o;
  const DType real, state, weight;
  const std::int64_t rows, nseq, slots;
  Tensor x, dt, z, dy, A, B, C, D, bias, initial, dfinal;
  Tensor y, final_state, checkpoints, dx, ddt, dz, dA, dB, dC, dD, dbias, dinitial;
};

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

// Every number of lanes that can be left over, states that need every block size, rows with gaps between them.
const testing::Case kShapes("shapes and dtypes", [] {
  for (DType dtype : kDTypes)
    for (const Shape& shape : {Shape{2, 3, 1, 1}, Shape{1, 65, 17, 16}, Shape{2, 64, 16, 5}, Shape{1, 5, 35, 31},
                               Shape{1, 130, 100, 3}}) {
      Options o;
      o.dtype = dtype, o.padding = shape.dim % 2 ? 3 : 0, o.threads = 2;
      Call(shape, o).run();
    }
});

const testing::Case kEmpty("empty batch, sequence, states", [] {
  for (bool complex : {false, true})
    for (const Shape& shape : {Shape{0, 7, 5, 3}, Shape{2, 0, 5, 3}, Shape{1, 4, 5, 0}, Shape{1, 4, 0, 3}}) {
      Options o;
      o.complex = complex;
      Call(shape, o).run();
    }
  Options packed;
  packed.cu_seqlens = {0, 0, 0};
  Call({1, 0, 5, 3}, packed).run();
});

const testing::Case kOptions("each option", [] {
  const auto with = [](auto change, Shape shape) {
    Options o;
    change(o);
    Call(shape, o).run();
  };
  with([](Options& o) { o.D = o.z = o.bias = o.initial = false; }, {2, 20, 9, 4});
  with([](Options& o) { o.softplus = false; }, {2, 20, 9, 4});
  with([](Options& o) { o.reverse = true; }, {2, 70, 9, 4});
  with([](Options& o) { o.B_groups = 0; }, {2, 70, 19, 6});
  with([](Options& o) { o.C_groups = 0; }, {2, 70, 19, 6});
  with([](Options& o) { o.B_groups = o.C_groups = 0; }, {2, 70, 19, 6});
  with([](Options& o) { o.B_groups = 2, o.C_groups = 3, o.padding = 1; }, {1, 70, 36, 6});
  with([](Options& o) { o.B_groups = o.C_groups = 5; }, {1, 10, 5, 2});
});

void walks(bool complex) {
  for (bool reverse : {false, true}) {
    Options o;
    o.complex = complex, o.reverse = reverse, o.threads = 3;
    o.cu_seqlens = {0, 0, 3, 70, 71, 200};
    Call({1, 200, 20, 4}, o).run();
    o.cu_seqlens.clear();
    for (std::int32_t i = 0; i < 131; ++i) o.order.push_back(i * 50 % 131);
    Call({2, 131, 5, 4}, o).run();
    for (int i = 0; i < 2 * 131; ++i) o.flags.push_back(static_cast<std::uint8_t>(i * 7 % 5 == 0 ? i % 4 : 0));
    for (int i = 0; i < 70; ++i) o.flags[i] = 2;
    o.flags[69] = 3;
    Call({2, 131, 5, 4}, o).run();
  }
}
const testing::Case kWalks("packed, paths, restarts and pads", [] { walks(false); });

const testing::Case kSegments("more threads than channels: the length is cut", [] {
  for (bool reverse : {false, true}) {
    Options o;
    o.threads = 12, o.reverse = reverse;
    Call({1, 700, 5, 4}, o).run();
    Call({1, 270, 40, 3}, o).run();
    for (int i = 0; i < 700; ++i) o.flags.push_back(static_cast<std::uint8_t>(i % 97 == 5 ? 1 : i % 11 == 3 ? 2 : 0));
    Call({1, 700, 5, 4}, o).run();
    o.flags.clear();
    o.cu_seqlens = {0, 300, 300, 650, 700};
    o.threads = 40;
    Call({1, 700, 5, 4}, o).run();
  }
});

const testing::Case kComplex("complex states", [] {
  for (DType dtype : kDTypes)
    for (std::int64_t groups : {0, 1, 2}) {
      Options o;
      o.complex = true, o.dtype = dtype, o.B_groups = groups, o.C_groups = groups == 2 ? 1 : groups, o.padding = 2;
      o.threads = 2;
      Call({2, 70, 18, 3}, o).run();
    }
  walks(true);
});

// Rows beyond 2^31: two short sequences at the far end of a packed row, and rows 2^31 numbers apart.
const testing::Case kFar("indices beyond 2^31", [] {
  constexpr std::int64_t far = (std::int64_t{1} << 31) + 5, dim = 3, dstate = 2;
  const std::int64_t cu_seqlens[] = {far, far + 2, far + 3};
  const std::size_t bytes = (far + 3) * dim * sizeof(float);
  testing::Sparse x(bytes), dt(bytes), z(bytes), dy(bytes), y(bytes), dx(bytes), ddt(bytes), dz(bytes);
  testing::Sparse checkpoints((far / 64 + 4) * dim * dstate * sizeof(float));
  for (const testing::Sparse* memory : {&x, &dt, &z, &dy, &y, &dx, &ddt, &dz, &checkpoints})
    if (!*memory) return std::puts("(skipped: the system grants no such address space)"), void();

  // the same three tokens near and far
  for (std::int64_t i = 0; i < 3 * dim; ++i)
    for (const testing::Sparse* memory : {&x, &dt, &z, &dy})
      memory->as<float>()[i] = memory->as<float>()[far * dim + i] = static_cast<float>(testing::uniform());
  Tensor A(DType::float32, dim, dstate), weights(DType::float32, dim, dstate), final_state(DType::float32, 2 * dim, dstate);
  Tensor dA(DType::float32, dim, dstate), dB(DType::float32, dim, dstate), dC(DType::float32, dim, dstate);
  A.random(0.5, -0.6), weights.random(1.0);
  const auto call = [&](const std::int64_t* offsets) {
    SelectiveScanForward f{};
    f.dtype = DType::float32, f.dt_softplus = true, f.threads = 1;
    f.batch = 1, f.seqlen = offsets[2], f.dim = dim, f.dstate = dstate, f.nseq = 2;
    f.x = x.as<void>(), f.dt = dt.as<void>(), f.z = z.as<void>(), f.A = A.data(), f.B = f.C = weights.data();
    f.x_stride = f.dt_stride = f.z_stride = dim;
    f.cu_seqlens = offsets;
    f.y = y.as<void>(), f.y_stride = dim, f.final_state = final_state.data(), f.checkpoints = checkpoints.as<void>();
    SSMKIT_CPU(selective_scan_forward)(f);
    SelectiveScanBackward b{};
    static_cast<SelectiveScanParams&>(b) = f;
    b.checkpoints = checkpoints.as<void>(), b.dy = dy.as<void>(), b.dy_stride = b.ddt_stride = dim;
    b.dx = dx.as<void>(), b.ddt = ddt.as<void>(), b.dz = dz.as<void>();
    b.dA = dA.data(), b.dB = dB.data(), b.dC = dC.data();
    SSMKIT_CPU(selective_scan_backward)(b);
    return dA.values();
  };
  const std::int64_t near[] = {0, 2, 3};
  const std::vector<double> expected = call(near);
  if (call(cu_seqlens) != expected) testing::fail("dA of far rows");
  for (std::int64_t i = 0; i < 3 * dim; ++i)
    for (const testing::Sparse* memory : {&y, &dx, &ddt, &dz})
      if (memory->as<float>()[i] != memory->as<float>()[far * dim + i] || memory->as<float>()[i] == 0)
        return testing::fail("far row " + std::to_string(i));
});

const testing::Case kWideRows("row strides beyond 2^31", [] {
  constexpr std::int64_t stride = (std::int64_t{1} << 30) + 1, rows = 4, dim = 2, dstate = 3;
  testing::Sparse memory(((rows - 1) * stride + 16) * sizeof(float));
  if (!memory) return std::puts("(skipped: the system grants no such address space)"), void();
  float* wide = memory.as<float>();
  Tensor near(DType::float32, rows, 16), A(DType::float32, dim, dstate), y(DType::float32, rows, dim);
  Tensor final_state(DType::float32, dim, dstate), checkpoints(DType::float32, dstate, dim), dx(DType::float32, rows, dim);
  Tensor ddt(DType::float32, rows, dim), dz(DType::float32, rows, dim), dA(DType::float32, dim, dstate);
  Tensor dB(DType::float32, rows, dstate), dC(DType::float32, rows, dstate);
  A.random(0.5, -0.6), near.random(1.0);
  for (std::int64_t row = 0; row < rows; ++row)
    std::memcpy(wide + row * stride, static_cast<float*>(near.data()) + row * 16, 16 * sizeof(float));
  const auto call = [&](const float* base, std::int64_t step) {
    SelectiveScanForward f{};
    f.dtype = DType::float32, f.dt_softplus = true, f.threads = 1;
    f.batch = 1, f.seqlen = rows, f.dim = dim, f.dstate = dstate, f.nseq = 1, f.B_groups = f.C_groups = 1;
    f.x = base, f.dt = base + 2, f.z = base + 4, f.A = A.data(), f.B = base + 6, f.C = base + 9;
    f.x_stride = f.dt_stride = f.z_stride = f.B_stride = f.C_stride = step;
    f.y = y.data(), f.y_stride = dim, f.final_state = final_state.data(), f.checkpoints = checkpoints.data();
    SSMKIT_CPU(selective_scan_forward)(f);
    SelectiveScanBackward b{};
    static_cast<SelectiveScanParams&>(b) = f;
    b.checkpoints = checkpoints.data(), b.dy = base + 12, b.dy_stride = step;
    b.ddt_stride = dim, b.dB_stride = b.dC_stride = dstate;
    b.dx = dx.data(), b.ddt = ddt.data(), b.dz = dz.data(), b.dA = dA.data(), b.dB = dB.data(), b.dC = dC.data();
    SSMKIT_CPU(selective_scan_backward)(b);
    std::vector<double> all;
    for (const Tensor* tensor : {&y, &final_state, &dx, &ddt, &dz, &dA, &dB, &dC})
      for (double value : tensor->values()) all.push_back(value);
    return all;
  };
  const std::vector<double> expected = call(static_cast<float*>(near.data()), 16);
  if (call(wide, stride) != expected) testing::fail("rows far apart give other numbers");
});

}  // namespace
