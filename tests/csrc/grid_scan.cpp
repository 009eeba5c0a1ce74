// grid_scan against the equations written out cell by cell in double, all gradients included.
#include "cpu/grid_scan.h"

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Numbers = std::vector<double>;

struct Shape {
  std::int64_t batch, height, width, dim, dstate;
};

struct Options {
  DType dtype = DType::float32;
  bool D = true, z = true, bias = true, softplus = true, from_bottom = false, from_right = false, keep = true;
  std::int64_t padding = 0;  // numbers between the rows of the inputs
  int threads = 1;
};

// A sum over cells or channels, and of the absolute values of its terms: the measure of its rounding errors.
struct Sum {
  explicit Sum(std::int64_t count) : value(count, 0.0), size(count, 0.0) {}
  void add(std::int64_t i, double term) { value[i] += term, size[i] += std::fabs(term); }
  Numbers value, size;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }

class Call {
 public:
  Call(const Shape& shape, const Options& options)
      : s(shape), o(options), real(o.dtype == DType::float64 ? DType::float64 : DType::float32),
        rows(s.batch * s.height * s.width), slots(slots_of(s)), x(o.dtype, rows, s.dim, s.dim + o.padding),
        z(o.dtype, rows, s.dim, s.dim + 2 * o.padding), dy(o.dtype, rows, s.dim, s.dim + 3 * o.padding),
        dt{{o.dtype, rows, s.dim, s.dim + o.padding}, {o.dtype, rows, s.dim, s.dim + 4 * o.padding}},
        A{{real, s.dim, s.dstate}, {real, s.dim, s.dstate}},
        B{{o.dtype, rows, s.dstate, s.dstate + o.padding}, {o.dtype, rows, s.dstate, s.dstate + 2 * o.padding}},
        C(o.dtype, rows, s.dstate, s.dstate + o.padding), D(real, 1, s.dim), bias{{real, 1, s.dim}, {real, 1, s.dim}},
        y(o.dtype, rows, s.dim), checkpoints(real, slots * s.dstate, s.dim), dx(o.dtype, rows, s.dim),
        dz(o.dtype, rows, s.dim), ddt{{o.dtype, rows, s.dim}, {o.dtype, rows, s.dim}},
        dA{{real, s.dim, s.dstate}, {real, s.dim, s.dstate}}, dB{{o.dtype, rows, s.dstate}, {o.dtype, rows, s.dstate}},
        dC(o.dtype, rows, s.dstate), dD(real, 1, s.dim), dbias{{real, 1, s.dim}, {real, 1, s.dim}} {
    for (Tensor* tensor : {&x, &z, &dy, &B[0], &B[1], &C, &D}) tensor->random(1.0);
    for (int side : {0, 1}) {
      dt[side].random(o.softplus ? 2.0 : 0.1, o.softplus ? -1.0 : 0.15);
      bias[side].random(o.softplus ? 0.5 : 0.05, o.softplus ? -1.0 : 0.1);
      A[side].random(0.5, -0.6);
    }
  }

  void run() {
    GridScanForward f;
    set(f);
    f.y = y.data(), f.checkpoints = o.keep && slots ? checkpoints.data() : nullptr;
    SSMKIT_CPU(grid_scan_forward)(f);
    if (o.keep) {
      GridScanBackward b;
      set(b);
      b.checkpoints = checkpoints.data(), b.dy = dy.data(), b.dy_stride = dy.stride();
      b.dx = dx.data(), b.dz = o.z ? dz.data() : nullptr, b.dC = dC.data(), b.dD = o.D ? dD.data() : nullptr;
      for (int side : {0, 1}) {
        b.ddt[side] = ddt[side].data(), b.dA[side] = dA[side].data(), b.dB[side] = dB[side].data();
        b.ddt_bias[side] = o.bias ? dbias[side].data() : nullptr;
      }
      SSMKIT_CPU(grid_scan_backward)(b);
    }
    compare();
  }

 private:
  // Under every tile row but the last, and to the right of every tile column but the last.
  static std::int64_t slots_of(const Shape& s) {
    if (s.height == 0 || s.width == 0) return 0;
    return s.batch * ((s.height - 1) / 16 * s.width + (s.width - 1) / 16 * s.height);
  }

  void set(GridScanParams& p) const {
    p.dtype = o.dtype, p.dt_softplus = o.softplus, p.from_bottom = o.from_bottom, p.from_right = o.from_right;
    p.threads = o.threads, p.batch = s.batch, p.height = s.height, p.width = s.width, p.dim = s.dim;
    p.dstate = s.dstate, p.x = x.data(), p.z = o.z ? z.data() : nullptr, p.C = C.data();
    p.D = o.D ? D.data() : nullptr, p.x_stride = x.stride(), p.z_stride = z.stride(), p.C_stride = C.stride();
    for (int side : {0, 1}) {
      p.dt[side] = dt[side].data(), p.A[side] = A[side].data(), p.B[side] = B[side].data();
      p.dt_bias[side] = o.bias ? bias[side].data() : nullptr;
      p.dt_stride[side] = dt[side].stride(), p.B_stride[side] = B[side].stride();
    }
  }

  void check(const std::string& name, const Tensor& tensor, const Sum& sum) const {
    const std::string where = name + " (" + std::to_string(s.batch) + "," + std::to_string(s.height) + "," +
                              std::to_string(s.width) + "," + std::to_string(s.dim) + "," + std::to_string(s.dstate) +
                              ") dtype " + std::to_string(static_cast<int>(o.dtype));
    testing::close(where, tensor.values(), sum.value, sum.size, tensor.dtype());
  }

  std::int64_t row_of(std::int64_t b, std::int64_t i, std::int64_t j) const {
    return (b * s.height + (o.from_bottom ? s.height - 1 - i : i)) * s.width + (o.from_right ? s.width - 1 - j : j);
  }

  void compare() const {
    const Numbers x_ = x.values(), z_ = z.values(), dy_ = dy.values(), C_ = C.values(), D_ = D.values();
    const Numbers dt_[] = {dt[0].values(), dt[1].values()}, A_[] = {A[0].values(), A[1].values()};
    const Numbers B_[] = {B[0].values(), B[1].values()}, bias_[] = {bias[0].values(), bias[1].values()};
    const std::int64_t N = s.dstate, W = s.width;
    Sum ey(rows * s.dim), ex(rows * s.dim), ez(rows * s.dim), eC(rows * N), eD(s.dim);
    Sum edt[] = {ey, ey}, eA[] = {Sum(s.dim * N), Sum(s.dim * N)}, eB[] = {eC, eC}, ebias[] = {eD, eD};
    for (std::int64_t b = 0; b < s.batch; ++b)
      for (std::int64_t d = 0; d < s.dim; ++d) {
        const auto raw = [&](int side, std::int64_t row) {
          return dt_[side][row * s.dim + d] + (o.bias ? bias_[side][d] : 0.0);
        };
        const auto step = [&](int side, std::int64_t row) {
          return o.softplus ? std::log1p(std::exp(raw(side, row))) : raw(side, row);
        };
        // side 0 comes from above, side 1 from the left
        const auto there = [](int side, std::int64_t i, std::int64_t j) { return side == 0 ? i > 0 : i == 0 || j > 0; };
        const auto before = [&](const Numbers& h, int side, std::int64_t i, std::int64_t j, std::int64_t n) {
          if (side == 0 ? i == 0 : j == 0) return 0.0;
          return h[((side == 0 ? i - 1 : i) * W + (side == 0 ? j : j - 1)) * N + n];
        };
        Numbers h(s.height * W * N, 0.0), g(s.height * W * N, 0.0);
        for (std::int64_t i = 0; i < s.height; ++i)
          for (std::int64_t j = 0; j < W; ++j) {
            const std::int64_t row = row_of(b, i, j), at = row * s.dim + d;
            double y_ = o.D ? D_[d] * x_[at] : 0.0;
            for (std::int64_t n = 0; n < N; ++n) {
              double sum = 0.0;
              for (int side : {0, 1})
                if (there(side, i, j))
                  sum += std::exp(step(side, row) * A_[side][d * N + n]) * before(h, side, i, j, n) +
                         step(side, row) * x_[at] * B_[side][row * N + n];
              h[(i * W + j) * N + n] = sum * (i > 0 && j > 0 ? 0.5 : 1.0);
              y_ += C_[row * N + n] * h[(i * W + j) * N + n];
            }
            ey.add(at, o.z ? y_ * silu(z_[at]) : y_);
            const double gate = sigmoid(z_[at]);
            if (o.z) ez.add(at, dy_[at] * y_ * gate * (1 + z_[at] * (1 - gate)));
          }
        for (std::int64_t i = s.height - 1; i >= 0; --i)
          for (std::int64_t j = W - 1; j >= 0; --j) {
            const std::int64_t row = row_of(b, i, j), at = row * s.dim + d;
            const double e = dy_[at] * (o.z ? silu(z_[at]) : 1.0);
            if (o.D) ex.add(at, D_[d] * e);
            eD.add(d, e * x_[at]);
            double ddt_[] = {0.0, 0.0};
            for (std::int64_t n = 0; n < N; ++n) {
              const std::int64_t cell = (i * W + j) * N + n;
              eC.add(row * N + n, e * h[cell]);
              const double grad = (g[cell] + C_[row * N + n] * e) * (i > 0 && j > 0 ? 0.5 : 1.0);
              for (int side : {0, 1}) {
                if (!there(side, i, j)) continue;
                const double delta = step(side, row), rate = A_[side][d * N + n], a = std::exp(delta * rate);
                const double q = grad * a * before(h, side, i, j, n), B_n = B_[side][row * N + n];
                if (side == 0 ? i > 0 : j > 0) g[cell - (side == 0 ? W : 1) * N] += grad * a;
                eB[side].add(row * N + n, grad * delta * x_[at]);
                ex.add(at, grad * delta * B_n);
                eA[side].add(d * N + n, delta * q);
                ddt_[side] += grad * x_[at] * B_n + q * rate;
                const double slope = o.softplus ? sigmoid(raw(side, row)) : 1.0;
                edt[side].size[at] += std::fabs((std::fabs(grad * x_[at] * B_n) + std::fabs(q * rate)) * slope);
              }
            }
            for (int side : {0, 1}) {
              const double slope = o.softplus ? sigmoid(raw(side, row)) : 1.0;
              edt[side].value[at] += ddt_[side] * slope;
              ebias[side].add(d, ddt_[side] * slope);
            }
          }
      }
    check("y", y, ey);
    if (!o.keep) return;
    check("dx", dx, ex), check("dC", dC, eC);
    if (o.z) check("dz", dz, ez);
    if (o.D) check("dD", dD, eD);
    for (int side : {0, 1}) {
      const std::string name = side ? " left" : " top";
      check("ddt" + name, ddt[side], edt[side]), check("dA" + name, dA[side], eA[side]);
      check("dB" + name, dB[side], eB[side]);
      if (o.bias) check("ddt_bias" + name, dbias[side], ebias[side]);
    }
  }

  const Shape s;
  const Options o;
  const DType real;
  const std::int64_t rows, slots;
  Tensor x, z, dy, dt[2], A[2], B[2], C, D, bias[2];
  Tensor y, checkpoints, dx, dz, ddt[2], dA[2], dB[2], dC, dD, dbias[2];
};

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

// Every number of lanes that can be left over, states that need every block size, rows with gaps between them.
const testing::Case kShapes("shapes and dtypes", [] {
  for (DType dtype : kDTypes)
    for (const Shape& shape : {Shape{2, 1, 1, 1, 1}, Shape{1, 17, 3, 17, 16}, Shape{2, 2, 16, 16, 5},
                               Shape{1, 3, 33, 35, 7}, Shape{1, 18, 19, 9, 3}}) {
      Options o;
      o.dtype = dtype, o.padding = shape.dim % 2 ? 3 : 0, o.threads = 2;
      Call(shape, o).run();
    }
});

const testing::Case kEmpty("empty batch, rows, columns, channels, states", [] {
  for (const Shape& shape : {Shape{0, 3, 7, 5, 3}, Shape{2, 0, 4, 5, 3}, Shape{2, 4, 0, 5, 3}, Shape{1, 17, 4, 0, 3},
                             Shape{1, 4, 17, 5, 0}})
    Call(shape, {}).run();
});

const testing::Case kOptions("each option", [] {
  const auto with = [](auto change, Shape shape) {
    Options o;
    change(o);
    Call(shape, o).run();
  };
  with([](Options& o) { o.D = o.z = o.bias = false; }, {2, 5, 4, 9, 4});
  with([](Options& o) { o.softplus = false; }, {2, 5, 4, 9, 4});
  with([](Options& o) { o.from_bottom = true; }, {2, 17, 3, 9, 4});
  with([](Options& o) { o.from_right = true; }, {2, 3, 18, 9, 4});
  with([](Options& o) { o.from_bottom = o.from_right = true, o.padding = 1; }, {1, 18, 17, 5, 2});
  with([](Options& o) { o.keep = false; }, {2, 33, 18, 9, 4});
});

const testing::Case kThreads("more threads than there are channels and images: tiles of a diagonal at once", [] {
  for (bool keep : {true, false}) {
    Options o;
    o.threads = 12, o.keep = keep;
    Call({1, 40, 50, 5, 2}, o).run();
    Call({3, 18, 34, 20, 3}, o).run();
  }
});

const testing::Case kWideRows("row strides beyond 2^31", [] {
  constexpr std::int64_t stride = (std::int64_t{1} << 30) + 1, rows = 4, width = 19, dim = 2, dstate = 3;
  testing::Sparse memory(((rows - 1) * stride + width) * sizeof(float));
  if (!memory) return std::puts("(skipped: the system grants no such address space)"), void();
  float* wide = memory.as<float>();
  Tensor near(DType::float32, rows, width), A[2] = {{DType::float32, dim, dstate}, {DType::float32, dim, dstate}};
  Tensor y(DType::float32, rows, dim), dx(DType::float32, rows, dim), dz(DType::float32, rows, dim);
  Tensor ddt[2] = {{DType::float32, rows, dim}, {DType::float32, rows, dim}}, dC(DType::float32, rows, dstate);
  Tensor dA[2] = {{DType::float32, dim, dstate}, {DType::float32, dim, dstate}};
  Tensor dB[2] = {{DType::float32, rows, dstate}, {DType::float32, rows, dstate}};
  near.random(1.0), A[0].random(0.5, -0.6), A[1].random(0.5, -0.6);
  for (std::int64_t row = 0; row < rows; ++row)
    std::memcpy(wide + row * stride, static_cast<float*>(near.data()) + row * width, width * sizeof(float));
  const auto call = [&](const float* base, std::int64_t step) {
    GridScanForward f{};
    f.dtype = DType::float32, f.dt_softplus = true, f.threads = 1;
    f.batch = 1, f.height = f.width = 2, f.dim = dim, f.dstate = dstate;
    f.x = base, f.z = base + 6, f.C = base + 14, f.x_stride = f.z_stride = f.C_stride = step;
    for (int side : {0, 1}) {
      f.dt[side] = base + 2 + 2 * side, f.A[side] = A[side].data(), f.B[side] = base + 8 + 3 * side;
      f.dt_stride[side] = f.B_stride[side] = step;
    }
    f.y = y.data();
    SSMKIT_CPU(grid_scan_forward)(f);
    GridScanBackward b{};
    static_cast<GridScanParams&>(b) = f;
    b.dy = base + 17, b.dy_stride = step, b.dx = dx.data(), b.dz = dz.data(), b.dC = dC.data();
    for (int side : {0, 1}) b.ddt[side] = ddt[side].data(), b.dA[side] = dA[side].data(), b.dB[side] = dB[side].data();
    SSMKIT_CPU(grid_scan_backward)(b);
    Numbers all;
    for (const Tensor* tensor : {&y, &dx, &dz, &dC, &ddt[0], &ddt[1], &dA[0], &dA[1], &dB[0], &dB[1]})
      for (double value : tensor->values()) all.push_back(value);
    return all;
  };
  const Numbers expected = call(static_cast<float*>(near.data()), width);
  if (call(wide, stride) != expected) testing::fail("rows far apart give other numbers");
});

}  // namespace
