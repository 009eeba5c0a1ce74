// cross_selective_scan against one selective_scan per path, which tests/csrc/selective_scan.cpp holds to its equations: the
// sums over paths, the views of one projection, and that nothing is written beside the outputs.
#include "cpu/cross_selective_scan.h"

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;

struct Options {
  DType dtype = DType::float32;
  bool D = true, z = true, bias = true, merged = true;
  std::int64_t groups = 1;
  std::vector<std::uint8_t> flags;
  int threads = 1;
};

class Call {
 public:
  Call(std::int64_t batch, std::int64_t seqlen, std::int64_t dim, std::int64_t dstate, std::int64_t npaths,
       const Options& options)
      : batch(batch), seqlen(seqlen), dim(dim), dstate(dstate), npaths(npaths), o(options), rows(batch * seqlen),
        real(o.dtype == DType::float64 ? DType::float64 : DType::float32), slots(batch * ((seqlen + 63) / 64)),
        size(o.dtype == DType::float64 ? 8 : o.dtype == DType::float32 ? 4 : 2), width(dim + 2 * o.groups * dstate + 1),
        x(o.dtype, rows, dim, dim + 1), z(o.dtype, rows, dim), projection(o.dtype, rows, npaths * width),
        dy(o.dtype, rows, (o.merged ? 1 : npaths) * dim), A(real, npaths * dim, dstate), D(real, npaths, dim),
        bias(real, npaths, dim), y(o.dtype, rows, (o.merged ? 1 : npaths) * dim),
        checkpoints(real, npaths * slots * dstate, dim), dx(o.dtype, rows, dim), ddt(o.dtype, rows, npaths * dim),
        dz(o.dtype, rows, dim), dA(real, npaths * dim, dstate), dB(o.dtype, rows, npaths * o.groups * dstate),
        dC(o.dtype, rows, npaths * o.groups * dstate), dD(real, npaths, dim), dbias(real, npaths, dim) {
    for (Tensor* tensor : {&x, &z, &projection, &dy, &D}) tensor->random(1.0);
    bias.random(0.5, -1.0), A.random(0.5, -0.6);
    for (std::int64_t i = 0; i < seqlen; ++i) order.push_back(static_cast<std::int32_t>(i * 7 % seqlen));
    for (std::int64_t k = 0; k < npaths; ++k)
      paths.push_back({k % 2 ? order.data() : nullptr, o.flags.empty() ? nullptr : o.flags.data(), k >= 2});
  }

  void run() {
    CrossSelectiveScanForward f{};
    set(f);
    f.y = y.data(), f.checkpoints = checkpoints.data();
    SSMKIT_CPU(cross_selective_scan_forward)(f);
    CrossSelectiveScanBackward b{};
    set(b);
    b.checkpoints = checkpoints.data(), b.dy = dy.data(), b.dy_stride = dy.stride(), b.dy_path = o.merged ? 0 : dim;
    b.dx = dx.data(), b.ddt = ddt.data(), b.dz = o.z ? dz.data() : nullptr, b.dA = dA.data();
    b.dB = dB.data(), b.dC = dC.data(), b.dD = o.D ? dD.data() : nullptr, b.ddt_bias = o.bias ? dbias.data() : nullptr;
    SSMKIT_CPU(cross_selective_scan_backward)(b);
    compare();
  }

 private:
  const void* at(const Tensor& tensor, std::int64_t index, std::int64_t bytes) const {
    return static_cast<const char*>(tensor.data()) + index * bytes;
  }

  void set(CrossSelectiveScanParams& p) const {
    p.dtype = o.dtype, p.dt_softplus = true, p.merged = o.merged, p.threads = o.threads;
    p.batch = batch, p.seqlen = seqlen, p.dim = dim, p.dstate = dstate, p.npaths = npaths;
    p.B_groups = p.C_groups = o.groups;
    p.x = x.data(), p.z = o.z ? z.data() : nullptr, p.A = A.data();
    p.dt = projection.data(), p.B = at(projection, dim, size), p.C = at(projection, dim + o.groups * dstate, size);
    p.D = o.D ? D.data() : nullptr, p.dt_bias = o.bias ? bias.data() : nullptr, p.paths = paths.data();
    p.x_stride = x.stride(), p.z_stride = z.stride(), p.dt_stride = p.B_stride = p.C_stride = projection.stride();
    p.dt_path = p.B_path = p.C_path = width;
  }

  // Adds `values`, rows of `from` numbers, to the columns at `begin` of rows of `to`.
  static void add(std::vector<double>& sums, std::vector<double>& sizes, const Tensor& tensor, std::int64_t from,
                  std::int64_t to, std::int64_t begin) {
    const std::vector<double> values = tensor.values();
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::size_t place = i / from * to + begin + i % from;
      sums[place] += values[i], sizes[place] += std::abs(values[i]);
    }
  }

  void compare() {
    struct Expected {
      const char* name;
      const Tensor& tensor;
      std::vector<double> sum = std::vector<double>(tensor.values().size()), size = sum;
    };
    Expected ey{"y", y}, edx{"dx", dx}, eddt{"ddt", ddt}, edz{"dz", dz}, eA{"dA", dA}, eB{"dB", dB}, eC{"dC", dC};
    Expected eD{"dD", dD}, ebias{"ddt_bias", dbias};
    const std::int64_t weights = o.groups * dstate;
    for (std::int64_t k = 0; k < npaths; ++k) {
      Tensor y_k(o.dtype, rows, dim), final_state(real, batch * dim, dstate), saved(real, slots * dstate, dim);
      Tensor dx_k(o.dtype, rows, dim), ddt_k(o.dtype, rows, dim), dz_k(o.dtype, rows, dim), dA_k(real, dim, dstate);
      Tensor dB_k(o.dtype, rows, weights), dC_k(o.dtype, rows, weights), dD_k(real, 1, dim), dbias_k(real, 1, dim);
      const std::int64_t wide = real == DType::float64 ? 8 : 4;
      SelectiveScanForward f{};
      f.dtype = o.dtype, f.dt_softplus = true, f.reverse = paths[k].reverse, f.threads = 1;
      f.batch = f.nseq = batch, f.seqlen = seqlen, f.dim = dim, f.dstate = dstate, f.B_groups = f.C_groups = o.groups;
      f.x = x.data(), f.z = o.z ? z.data() : nullptr, f.dt = at(projection, k * width, size);
      f.B = at(projection, k * width + dim, size), f.C = at(projection, k * width + dim + weights, size);
      f.A = at(A, k * dim * dstate, wide), f.D = o.D ? at(D, k * dim, wide) : nullptr;
      f.dt_bias = o.bias ? at(bias, k * dim, wide) : nullptr;
      f.order = paths[k].order, f.flags = paths[k].flags;
      f.x_stride = x.stride(), f.z_stride = z.stride(), f.dt_stride = f.B_stride = f.C_stride = projection.stride();
      f.y = y_k.data(), f.y_stride = dim, f.final_state = final_state.data(), f.checkpoints = saved.data();
      SSMKIT_CPU(selective_scan_forward)(f);
      SelectiveScanBackward b{};
      static_cast<SelectiveScanParams&>(b) = f;
      b.checkpoints = saved.data(), b.dy = at(dy, o.merged ? 0 : k * dim, size), b.dy_stride = dy.stride();
      b.ddt_stride = dim, b.dB_stride = b.dC_stride = weights;
      b.dx = dx_k.data(), b.ddt = ddt_k.data(), b.dz = o.z ? dz_k.data() : nullptr, b.dA = dA_k.data();
      b.dB = dB_k.data(), b.dC = dC_k.data(), b.dD = o.D ? dD_k.data() : nullptr;
      b.ddt_bias = o.bias ? dbias_k.data() : nullptr;
      SSMKIT_CPU(selective_scan_backward)(b);

      add(ey.sum, ey.size, y_k, dim, o.merged ? dim : npaths * dim, o.merged ? 0 : k * dim);
      add(edx.sum, edx.size, dx_k, dim, dim, 0);
      add(eddt.sum, eddt.size, ddt_k, dim, npaths * dim, k * dim);
      add(eA.sum, eA.size, dA_k, dim * dstate, npaths * dim * dstate, k * dim * dstate);
      add(eB.sum, eB.size, dB_k, weights, npaths * weights, k * weights);
      add(eC.sum, eC.size, dC_k, weights, npaths * weights, k * weights);
      if (o.z) add(edz.sum, edz.size, dz_k, dim, dim, 0);
      if (o.D) add(eD.sum, eD.size, dD_k, dim, npaths * dim, k * dim);
      if (o.bias) add(ebias.sum, ebias.size, dbias_k, dim, npaths * dim, k * dim);
    }
    for (const Expected* e : {&ey, &edx, &eddt, &edz, &eA, &eB, &eC, &eD, &ebias}) {
      if ((e == &edz && !o.z) || (e == &eD && !o.D) || (e == &ebias && !o.bias)) continue;
      const std::string where = " (" + std::to_string(batch) + "," + std::to_string(seqlen) + "," + std::to_string(dim) +
                                "," + std::to_string(dstate) + "," + std::to_string(npaths) + ") dtype " +
                                std::to_string(static_cast<int>(o.dtype));
      testing::close(e->name + where, e->tensor.values(), e->sum, e->size, e->tensor.dtype());
    }
  }

  const std::int64_t batch, seqlen, dim, dstate, npaths;
  const Options o;
  const std::int64_t rows;
  const DType real;
  const std::int64_t slots, size, width;  // of a path in a row of the projection
  Tensor x, z, projection, dy, A, D, bias;
  Tensor y, checkpoints, dx, ddt, dz, dA, dB, dC, dD, dbias;
  std::vector<std::int32_t> order;
  std::vector<ScanPathTables> paths;
};

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

const testing::Case kShapes("shapes and dtypes", [] {
  for (DType dtype : kDTypes)
    for (bool merged : {true, false}) {
      Options o;
      o.dtype = dtype, o.merged = merged, o.threads = 2;
      Call(2, 3, 1, 1, 1, o).run();
      Call(1, 65, 17, 16, 4, o).run();
      Call(2, 66, 35, 5, 3, o).run();
    }
});

const testing::Case kEmpty("empty batch, sequence, states, channels", [] {
  Call(0, 7, 5, 3, 2, {}).run();
  Call(2, 0, 5, 3, 2, {}).run();
  Call(1, 4, 5, 0, 2, {}).run();
  Call(1, 4, 0, 3, 2, {}).run();
});

const testing::Case kOptions("options, pads and restarts, groups", [] {
  Options o;
  for (int i = 0; i < 2 * 71; ++i) o.flags.push_back(static_cast<std::uint8_t>(i * 7 % 5 == 0 ? i % 4 : 0));
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    o.dtype = dtype;
    Call(2, 71, 5, 4, 4, o).run();
  }
  o.flags.clear();
  o.D = o.z = o.bias = false;
  Call(2, 20, 9, 4, 3, o).run();
  o.groups = 3;
  Call(2, 20, 9, 4, 3, o).run();
});

constexpr DType f64 = DType::float64;

// Low-rank step sizes against the same call with the step sizes they expand to, in float64.
void low_rank(std::int64_t batch, std::int64_t seqlen, std::int64_t dim, std::int64_t dstate, std::int64_t npaths,
              std::int64_t rank, const std::vector<std::uint8_t>& flags, int threads) {
  const std::int64_t rows = batch * seqlen, slots = batch * ((seqlen + 63) / 64);
  Tensor x(f64, rows, dim), dy(f64, rows, dim), B(f64, rows, npaths * dstate), C(f64, rows, npaths * dstate);
  Tensor low(f64, rows, npaths * rank, npaths * rank + 3), weight(f64, npaths * dim, rank), A(f64, npaths * dim, dstate);
  for (Tensor* tensor : {&x, &dy, &B, &C, &low, &weight}) tensor->random(1.0);
  A.random(0.5, -0.6);
  Tensor full(f64, rows, npaths * dim);
  const std::vector<double> lows = low.values(), weights = weight.values();
  std::vector<double> products(rows * npaths * dim);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t c = 0; c < npaths * dim; ++c)
      for (std::int64_t r = 0; r < rank; ++r)
        products[row * npaths * dim + c] += lows[row * npaths * rank + c / dim * rank + r] * weights[c * rank + r];
  full.set(products);
  std::vector<std::int32_t> order;
  for (std::int64_t i = 0; i < seqlen; ++i) order.push_back(static_cast<std::int32_t>(i * 7 % seqlen));
  std::vector<ScanPathTables> paths;
  for (std::int64_t k = 0; k < npaths; ++k)
    paths.push_back({k % 2 ? order.data() : nullptr, flags.empty() ? nullptr : flags.data(), k >= 2});

  struct Result {
    Result(std::int64_t rows, std::int64_t dim, std::int64_t dstate, std::int64_t npaths, std::int64_t slots,
           std::int64_t dt)
        : y(f64, rows, dim), dx(f64, rows, dim), ddt(f64, rows, npaths * dt), dA(f64, npaths * dim, dstate),
          dB(f64, rows, npaths * dstate), dC(f64, rows, npaths * dstate), saved(f64, npaths * slots * dstate, dim) {}
    Tensor y, dx, ddt, dA, dB, dC, saved;
  };
  Result expected(rows, dim, dstate, npaths, slots, dim), actual(rows, dim, dstate, npaths, slots, rank);
  Tensor dweight(f64, npaths * dim, rank);
  for (const bool short_form : {false, true}) {
    Result& result = short_form ? actual : expected;
    const auto set = [&](CrossSelectiveScanParams& p) {
      p.dtype = f64, p.dt_softplus = true, p.merged = true, p.threads = threads;
      p.batch = batch, p.seqlen = seqlen, p.dim = dim, p.dstate = dstate, p.npaths = npaths, p.B_groups = p.C_groups = 1;
      p.x = x.data(), p.A = A.data(), p.B = B.data(), p.C = C.data(), p.paths = paths.data();
      p.x_stride = dim, p.B_stride = p.C_stride = npaths * dstate, p.B_path = p.C_path = dstate;
      p.dt = short_form ? low.data() : full.data(), p.dt_stride = short_form ? low.stride() : full.stride();
      p.dt_path = short_form ? rank : dim;
      if (short_form) p.dt_rank = rank, p.dt_weight = weight.data();
    };
    CrossSelectiveScanForward f{};
    set(f);
    f.y = result.y.data(), f.checkpoints = result.saved.data();
    SSMKIT_CPU(cross_selective_scan_forward)(f);
    CrossSelectiveScanBackward b{};
    set(b);
    b.checkpoints = result.saved.data(), b.dy = dy.data(), b.dy_stride = dim, b.dx = result.dx.data();
    b.ddt = result.ddt.data(), b.dA = result.dA.data(), b.dB = result.dB.data(), b.dC = result.dC.data();
    if (short_form) b.ddt_weight = dweight.data();
    SSMKIT_CPU(cross_selective_scan_backward)(b);
  }

  std::vector<double> dlow(rows * npaths * rank), dlow_size = dlow, dw(npaths * dim * rank), dw_size = dw;
  const std::vector<double> ddt = expected.ddt.values();
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t c = 0; c < npaths * dim; ++c)
      for (std::int64_t r = 0; r < rank; ++r) {
        const std::int64_t at_low = row * npaths * rank + c / dim * rank + r, at_weight = c * rank + r;
        const double g = ddt[row * npaths * dim + c];
        dlow[at_low] += g * weights[at_weight], dlow_size[at_low] += std::abs(g * weights[at_weight]);
        dw[at_weight] += g * lows[at_low], dw_size[at_weight] += std::abs(g * lows[at_low]);
      }
  testing::close("low rank ddt", actual.ddt.values(), dlow, dlow_size, f64);
  testing::close("low rank ddt_weight", dweight.values(), dw, dw_size, f64);
  const std::pair<const char*, Tensor Result::*> kept[] = {
      {"y", &Result::y}, {"dx", &Result::dx}, {"dA", &Result::dA}, {"dB", &Result::dB}, {"dC", &Result::dC}};
  for (const auto& [name, member] : kept) {
    const std::vector<double> wanted = (expected.*member).values();
    // Slack: step sizes that differ by a rounding move every state after them, on both sides.
    testing::close(std::string("low rank ") + name, (actual.*member).values(), wanted, f64, 16.0);
  }
}

const testing::Case kLowRank("low-rank step sizes", [] {
  std::vector<std::uint8_t> flags;
  for (int i = 0; i < 2 * 71; ++i) flags.push_back(static_cast<std::uint8_t>(i * 7 % 5 == 0 ? i % 4 : 0));
  low_rank(2, 71, 37, 4, 4, 3, flags, 2);
  low_rank(1, 66, 9, 2, 2, 17, {}, 1);
  low_rank(1, 701, 5, 3, 2, 2, {}, 12);
  low_rank(2, 0, 5, 3, 2, 2, {}, 1);
});

const testing::Case kSegments("more threads than channels: the length of every path is cut", [] {
  Options o;
  o.threads = 12;
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    o.dtype = dtype;
    Call(1, 701, 5, 4, 4, o).run();
  }
});

}  // namespace
