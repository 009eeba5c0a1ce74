// causal_conv1d against its sum written out over a table of the rows under the taps, all gradients included.
#include "cpu/causal_conv1d.h"

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Numbers = std::vector<double>;

struct Shape {
  std::int64_t batch, seqlen, dim, width;
};

struct Options {
  DType dtype = DType::float32;
  bool silu = true, bias = true, initial = true, reverse = false;
  std::vector<std::int32_t> order;
  std::vector<std::int64_t> cu_seqlens;
  std::vector<std::uint8_t> flags;
  std::int64_t padding = 0;  // numbers between the rows of x and dy
  int threads = 1;
};

constexpr std::int64_t kZero = -1;

// Every tensor of a call, and the naive computation on the same rounded numbers.
class Call {
 public:
  Call(const Shape& shape, const Options& options)
      : s(shape), o(options), real(o.dtype == DType::float64 ? DType::float64 : DType::float32), rows(s.batch * s.seqlen),
        window(s.width - 1),
        nseq(o.cu_seqlens.empty() ? s.batch : static_cast<std::int64_t>(o.cu_seqlens.size()) - 1),
        x(o.dtype, rows, s.dim, s.dim + o.padding), dy(o.dtype, rows, s.dim, s.dim + 2 * o.padding),
        weight(real, s.dim, s.width), bias(real, 1, s.dim), initial(o.dtype, nseq * window, s.dim),
        dfinal(o.dtype, nseq * window, s.dim), y(o.dtype, rows, s.dim), final_state(o.dtype, nseq * window, s.dim),
        dx(o.dtype, rows, s.dim), dweight(real, s.dim, s.width), dbias(real, 1, s.dim),
        dinitial(o.dtype, nseq * window, s.dim) {
    for (Tensor* tensor : {&x, &dy, &weight, &bias, &initial, &dfinal}) tensor->random(1.0);
  }

  void run() {
    CausalConv1dForward f;
    set(f);
    f.y = y.data(), f.final_state = final_state.data();
    SSMKIT_CPU(causal_conv1d_forward)(f);

    CausalConv1dBackward b;
    set(b);
    b.dy = dy.data(), b.dy_stride = dy.stride(), b.dfinal_state = dfinal.data(), b.dx = dx.data();
    b.dweight = dweight.data(), b.dbias = o.bias ? dbias.data() : nullptr;
    b.dinitial_state = o.initial ? dinitial.data() : nullptr;
    SSMKIT_CPU(causal_conv1d_backward)(b);
    compare();
  }

 private:
  void set(CausalConv1dParams& p) const {
    p.dtype = o.dtype, p.silu = o.silu, p.reverse = o.reverse, p.threads = o.threads;
    p.batch = s.batch, p.seqlen = s.seqlen, p.dim = s.dim, p.width = s.width, p.nseq = nseq;
    p.x = x.data(), p.x_stride = x.stride(), p.weight = weight.data();
    p.bias = o.bias ? bias.data() : nullptr, p.initial_state = o.initial ? initial.data() : nullptr;
    p.order = o.order.empty() ? nullptr : o.order.data();
    p.flags = o.flags.empty() ? nullptr : o.flags.data();
    p.cu_seqlens = o.cu_seqlens.empty() ? nullptr : o.cu_seqlens.data();
  }

  // Rows 0..rows-1 are tokens, the entries of the initial states follow; kZero counts as zero.
  void fill_tables() {
    taps.assign(static_cast<std::size_t>(rows), {});
    for (std::int64_t q = 0; q < nseq; ++q) {
      const std::int64_t start = o.cu_seqlens.empty() ? q * s.seqlen : o.cu_seqlens[q];
      const std::int64_t length = o.cu_seqlens.empty() ? s.seqlen : o.cu_seqlens[q + 1] - start;
      std::vector<std::int64_t> before;
      for (std::int64_t i = 0; i < window; ++i) before.push_back(o.initial ? rows + q * window + i : kZero);
      for (std::int64_t step = 0; step < length; ++step) {
        const std::int64_t p = o.reverse ? length - 1 - step : step;
        const std::int64_t row = start + (o.order.empty() ? p : o.order[p]);
        const int flag = o.flags.empty() ? 0 : o.flags[row];
        if (flag & 1) before.assign(window, kZero);
        if (flag & 2) continue;
        before.push_back(row);
        taps[row] = before;
        before.erase(before.begin());
      }
      last.push_back(before);
    }
  }

  void compare() {
    fill_tables();
    Numbers input = x.values(), dinput(input.size() + initial.values().size(), 0.0);
    for (const double value : initial.values()) input.push_back(value);
    const Numbers w = weight.values(), b = bias.values(), cotangent = dy.values(), cofinal = dfinal.values();
    Numbers y_expected(rows * s.dim, 0.0), final_expected(nseq * window * s.dim, 0.0);
    Numbers dw(s.dim * s.width, 0.0), db(s.dim, 0.0);
    const auto at = [&](std::int64_t row, std::int64_t c) { return row == kZero ? 0.0 : input[row * s.dim + c]; };
    for (std::int64_t row = 0; row < rows; ++row) {
      if (taps[row].empty()) continue;
      for (std::int64_t c = 0; c < s.dim; ++c) {
        double v = o.bias ? b[c] : 0.0;
        for (std::int64_t j = 0; j < s.width; ++j) v += w[c * s.width + j] * at(taps[row][j], c);
        const double e = std::exp(-v), sigmoid = 1 / (1 + e);
        y_expected[row * s.dim + c] = o.silu ? v * sigmoid : v;
        const double slope = o.silu ? sigmoid * (1 + v * (1 - sigmoid)) : 1.0, g = cotangent[row * s.dim + c] * slope;
        db[c] += g;
        for (std::int64_t j = 0; j < s.width; ++j) {
          dw[c * s.width + j] += g * at(taps[row][j], c);
          if (taps[row][j] != kZero) dinput[taps[row][j] * s.dim + c] += g * w[c * s.width + j];
        }
      }
    }
    for (std::int64_t q = 0; q < nseq; ++q)
      for (std::int64_t i = 0; i < window; ++i)
        for (std::int64_t c = 0; c < s.dim; ++c) {
          const std::int64_t out = (q * window + i) * s.dim + c;
          final_expected[out] = at(last[q][i], c);
          if (last[q][i] != kZero) dinput[last[q][i] * s.dim + c] += cofinal[out];
        }

    testing::close("y", y.values(), y_expected, o.dtype);
    testing::close("final state", final_state.values(), final_expected, o.dtype);
    const Numbers dx_expected(dinput.begin(), dinput.begin() + rows * s.dim);
    testing::close("dx", dx.values(), dx_expected, o.dtype);
    // sums over all tokens of terms of both signs
    testing::close("dweight", dweight.values(), dw, real, 8);
    if (o.bias) testing::close("dbias", dbias.values(), db, real, 8);
    if (o.initial) testing::close("dinitial state", dinitial.values(), {dinput.begin() + rows * s.dim, dinput.end()}, o.dtype);
  }

  Shape s;
  Options o;
  DType real;
  std::int64_t rows, window, nseq;
  Tensor x, dy, weight, bias, initial, dfinal, y, final_state, dx, dweight, dbias, dinitial;
  std::vector<std::vector<std::int64_t>> taps, last;
};

void run(const Shape& shape, const Options& options) { Call(shape, options).run(); }

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

const testing::Case kPlain("plain walks of every dtype and width", [] {
  for (const DType dtype : kDTypes)
    for (const std::int64_t width : {1, 2, 3, 4, 7})
      for (const bool reverse : {false, true}) {
        Options o;
        o.dtype = dtype, o.reverse = reverse, o.padding = 3;
        run({2, 67, 37, width}, o);
        run({1, 2, 16, width}, o);
      }
});

const testing::Case kOptions("without what is optional", [] {
  for (const bool silu : {false, true})
    for (const bool bias : {false, true})
      for (const bool initial : {false, true}) {
        Options o;
        o.silu = silu, o.bias = bias, o.initial = initial;
        run({2, 70, 33, 4}, o);
        run({1, 1, 1, 3}, o);
      }
});

std::vector<std::uint8_t> flags(std::int64_t count, int restart_every, int pad_every) {
  std::vector<std::uint8_t> result;
  for (std::int64_t i = 0; i < count; ++i)
    result.push_back(static_cast<std::uint8_t>((i % restart_every == 3) | (i % pad_every == 2) << 1));
  return result;
}

const testing::Case kBent("restarts, pads and paths", [] {
  for (const int pad_every : {3, 70, 1000})
    for (const bool reverse : {false, true}) {
      Options o;
      o.reverse = reverse, o.threads = 3;
      o.flags = flags(2 * 150, 7, pad_every);
      run({2, 150, 21, 4}, o);
      for (std::int32_t i = 0; i < 150; ++i) o.order.push_back(i * 7 % 150);
      run({2, 150, 21, 4}, o);
      o.flags.assign(300, 2);
      run({2, 150, 21, 3}, o);
      o.flags[120] = 0;
      run({2, 150, 21, 9}, o);
    }
});

const testing::Case kPacked("packed sequences, some of them empty", [] {
  for (const bool reverse : {false, true}) {
    Options o;
    o.reverse = reverse, o.threads = 2;
    o.cu_seqlens = {0, 0, 64, 65, 65, 200, 202, 202};
    run({1, 202, 19, 4}, o);
    o.flags = flags(202, 11, 5);
    run({1, 202, 40, 6}, o);
  }
});

const testing::Case kParts("many parts and channel ranges", [] {
  Options o;
  o.threads = 4;
  run({3, 1100, 50, 4}, o);
});

const testing::Case kFar("rows more than 2^31 elements apart", [] {
  constexpr std::int64_t kStride = std::int64_t{1} << 30, kRows = 6, kDim = 5;
  testing::Sparse far(static_cast<std::size_t>(kStride * kRows) * sizeof(float));
  if (!far) return;
  float* x = far.as<float>();
  for (std::int64_t l = 0; l < kRows; ++l)
    for (std::int64_t c = 0; c < kDim; ++c) x[l * kStride + c] = static_cast<float>(10 * l + c);
  Tensor weight(DType::float32, kDim, 2), y(DType::float32, kRows, kDim), state(DType::float32, 1, kDim);
  weight.random(0.0, 1.0);
  CausalConv1dForward p{};
  p.dtype = DType::float32, p.threads = 1, p.batch = 1, p.seqlen = kRows, p.dim = kDim, p.width = 2, p.nseq = 1;
  p.x = x, p.x_stride = kStride, p.weight = weight.data(), p.y = y.data(), p.final_state = state.data();
  SSMKIT_CPU(causal_conv1d_forward)(p);
  Numbers expected;
  for (std::int64_t l = 0; l < kRows; ++l)
    for (std::int64_t c = 0; c < kDim; ++c) expected.push_back(10.0 * l + c + (l ? 10.0 * (l - 1) + c : 0.0));
  testing::close("y", y.values(), expected, DType::float32);
});

}  // namespace
