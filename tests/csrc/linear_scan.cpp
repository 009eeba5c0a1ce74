// linear_scan against its recurrence written out with complex numbers in double, all gradients included.
#include "cpu/linear_scan.h"

#include <complex>

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Number = std::complex<double>;
using Numbers = std::vector<Number>;

struct Shape {
  std::int64_t batch, seqlen, dim;
};

struct Options {
  DType dtype = DType::float32;
  bool constant_a = false, initial = true, reverse = false;
  std::vector<std::int64_t> cu_seqlens;
  std::vector<std::uint8_t> flags;
  std::int64_t padding = 0;  // numbers between the rows of the inputs
  int threads = 1;
};

// Every tensor of a call, and the naive computation on the same rounded numbers.
class Call {
 public:
  Call(const Shape& shape, const Options& options)
      : s(shape), o(options), state(o.dtype == DType::bfloat16 || o.dtype == DType::float16 ? DType::float32 : o.dtype),
        rows(s.batch * s.seqlen),
        nseq(o.cu_seqlens.empty() ? s.batch : static_cast<std::int64_t>(o.cu_seqlens.size()) - 1),
        a(o.constant_a ? state : o.dtype, o.constant_a ? 1 : rows, s.dim, s.dim + o.padding),
        b(o.dtype, rows, s.dim, s.dim + 2 * o.padding), dh(o.dtype, rows, s.dim, s.dim + 3 * o.padding),
        initial(state, nseq, s.dim), dfinal(state, nseq, s.dim), h(o.dtype, rows, s.dim), states(state, rows, s.dim),
        final_state(state, nseq, s.dim), da(o.constant_a ? state : o.dtype, o.constant_a ? 1 : rows, s.dim),
        db(o.dtype, rows, s.dim), dinitial(state, nseq, s.dim) {
    for (Tensor* tensor : {&b, &dh, &initial, &dfinal}) tensor->random(1.0);
    a.random(0.7);
  }

  void run() {
    const bool unrounded = o.constant_a && o.dtype != state;
    LinearScanForward f;
    set(f);
    f.b = b.data(), f.b_stride = b.stride();
    f.h = h.data(), f.states = unrounded ? states.data() : nullptr, f.final_state = final_state.data();
    SSMKIT_CPU(linear_scan_forward)(f);

    LinearScanBackward g;
    set(g);
    g.dh = dh.data(), g.dh_stride = dh.stride(), g.dfinal_state = dfinal.data();
    g.states = unrounded ? states.data() : h.data();
    g.da = da.data(), g.db = db.data(), g.dinitial_state = o.initial ? dinitial.data() : nullptr;
    SSMKIT_CPU(linear_scan_backward)(g);
    compare(unrounded);
  }

 private:
  void set(LinearScanParams& p) const {
    p.dtype = o.dtype, p.constant_a = o.constant_a, p.reverse = o.reverse, p.threads = o.threads;
    p.batch = s.batch, p.seqlen = s.seqlen, p.dim = s.dim, p.nseq = nseq;
    p.a = a.data(), p.a_stride = o.constant_a ? 0 : a.stride();
    p.initial_state = o.initial ? initial.data() : nullptr;
    p.flags = o.flags.empty() ? nullptr : o.flags.data();
    p.cu_seqlens = o.cu_seqlens.empty() ? nullptr : o.cu_seqlens.data();
  }

  static bool is_complex(const Tensor& tensor) {
    return tensor.dtype() == DType::complex64 || tensor.dtype() == DType::complex128;
  }

  static Numbers numbers(const Tensor& tensor) {
    const std::vector<double> values = tensor.values();
    Numbers result;
    for (std::size_t i = 0; i < values.size(); i += is_complex(tensor) ? 2 : 1)
      result.emplace_back(values[i], is_complex(tensor) ? values[i + 1] : 0.0);
    return result;
  }

  void check(const char* name, const Tensor& tensor, const Numbers& expected, double slack = 1.0) const {
    std::vector<double> parts;
    for (const Number& number : expected) {
      parts.push_back(number.real());
      if (is_complex(tensor)) parts.push_back(number.imag());
    }
    testing::close(std::string(name) + " " + describe(), tensor.values(), parts, tensor.dtype(), slack);
  }

  std::string describe() const {
    return "(" + std::to_string(s.batch) + "," + std::to_string(s.seqlen) + "," + std::to_string(s.dim) + ") dtype " +
           std::to_string(static_cast<int>(o.dtype)) + (o.constant_a ? " constant a" : "") + (o.reverse ? " reverse" : "");
  }

  void compare(bool unrounded) const {
    const Numbers a_ = numbers(a), b_ = numbers(b), dh_ = numbers(dh), initial_ = numbers(initial), dfinal_ = numbers(dfinal);
    Numbers eh(rows * s.dim), eda(a_.size()), edb(eh.size()), efinal(initial_.size()), einitial(initial_.size());
    for (std::int64_t q = 0; q < nseq; ++q) {
      const std::int64_t first = o.cu_seqlens.empty() ? q * s.seqlen : o.cu_seqlens[q];
      const std::int64_t length = o.cu_seqlens.empty() ? s.seqlen : o.cu_seqlens[q + 1] - first;
      const auto row_at = [&](std::int64_t p) { return first + (o.reverse ? length - 1 - p : p); };
      for (std::int64_t d = 0; d < s.dim; ++d) {
        const auto flag = [&](std::int64_t row) { return o.flags.empty() ? 0 : o.flags[row]; };
        const auto at_a = [&](std::int64_t row) { return o.constant_a ? d : row * s.dim + d; };
        Numbers before(length);
        Number x = o.initial ? initial_[q * s.dim + d] : 0.0;
        for (std::int64_t p = 0; p < length; ++p) {
          const std::int64_t row = row_at(p);
          if (flag(row) & 1) x = 0.0;
          before[p] = x;
          if (!(flag(row) & 2)) x = a_[at_a(row)] * x + b_[row * s.dim + d];
          eh[row * s.dim + d] = x;
        }
        efinal[q * s.dim + d] = x;
        Number g = dfinal_[q * s.dim + d];
        for (std::int64_t p = length; p-- > 0;) {
          const std::int64_t row = row_at(p);
          g += dh_[row * s.dim + d];
          if (!(flag(row) & 2)) {
            edb[row * s.dim + d] = g;
            eda[at_a(row)] += g * std::conj(before[p]);
            g *= std::conj(a_[at_a(row)]);
          }
          if (flag(row) & 1) g = 0.0;
        }
        einitial[q * s.dim + d] = g;
      }
    }
    check("h", h, eh), check("final_state", final_state, efinal), check("db", db, edb);
    // 8x for the gradient of a constant: a sum over tokens of both signs
    check("da", da, eda, o.constant_a ? 8.0 : 1.0);
    if (unrounded) check("states", states, eh);
    if (o.initial) check("dinitial_state", dinitial, einitial);
  }

  const Shape s;
  const Options o;
  const DType state;
  const std::int64_t rows, nseq;
  Tensor a, b, dh, initial, dfinal, h, states, final_state, da, db, dinitial;
};

constexpr DType kDTypes[] = {DType::float32, DType::float64,   DType::bfloat16,
                             DType::float16, DType::complex64, DType::complex128};

// Every number of lanes that can be left over, slices of every size, rows with gaps between them.
const testing::Case kShapes("shapes and dtypes", [] {
  for (DType dtype : kDTypes)
    for (bool constant_a : {false, true})
      for (const Shape& shape : {Shape{2, 3, 1}, Shape{1, 65, 17}, Shape{3, 20, 16}, Shape{2, 9, 251}}) {
        Options o;
        o.dtype = dtype, o.constant_a = constant_a, o.padding = shape.dim % 2 ? 3 : 0, o.threads = 2;
        Call(shape, o).run();
      }
});

const testing::Case kEmpty("empty batch, sequence, channels", [] {
  for (bool constant_a : {false, true}) {
    for (const Shape& shape : {Shape{0, 7, 5}, Shape{2, 0, 5}, Shape{1, 4, 0}}) {
      Options o;
      o.constant_a = constant_a, o.threads = 4;
      Call(shape, o).run();
    }
    Options packed;
    packed.constant_a = constant_a, packed.cu_seqlens = {0, 0, 0};
    Call({1, 0, 5}, packed).run();
  }
});

const testing::Case kWalks("packed, restarts and pads", [] {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::complex64})
    for (bool constant_a : {false, true})
      for (bool reverse : {false, true}) {
        Options o;
        o.dtype = dtype, o.constant_a = constant_a, o.reverse = reverse, o.threads = 3;
        Call({2, 40, 21}, o).run();
        o.cu_seqlens = {0, 0, 3, 70, 71, 200, 200};
        Call({1, 200, 20}, o).run();
        for (int i = 0; i < 200; ++i) o.flags.push_back(static_cast<std::uint8_t>(i * 7 % 5 == 0 ? i % 4 : 0));
        for (int i = 0; i < 30; ++i) o.flags[i] = 2;
        o.flags[29] = 3, o.initial = false;
        Call({1, 200, 20}, o).run();
      }
});

// Tensors beyond the size that is taken for cached: one row at a time, rows fetched ahead of a walk downwards.
const testing::Case kStreams("larger than a cache", [] {
  for (bool constant_a : {false, true})
    for (bool reverse : {false, true}) {
      Options o;
      o.constant_a = constant_a, o.reverse = reverse, o.threads = 2, o.padding = 1;
      Call({3, 700, 301}, o).run();
      o.cu_seqlens = {0, 5, 1301, 1301, 2100};
      Call({1, 2100, 301}, o).run();
    }
});

const testing::Case kSegments("more threads than channels: the length is cut", [] {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::complex64})
    for (bool constant_a : {false, true})
      for (bool reverse : {false, true}) {
        Options o;
        o.dtype = dtype, o.constant_a = constant_a, o.reverse = reverse, o.threads = 12;
        Call({1, 1100, 5}, o).run();
        for (int i = 0; i < 1100; ++i)
          o.flags.push_back(static_cast<std::uint8_t>(i % 397 == 5 ? 1 : i % 11 == 3 ? 2 : 0));
        Call({1, 1100, 19}, o).run();
        o.cu_seqlens = {0, 300, 300, 950, 1100};
        o.threads = 40;
        Call({1, 1100, 5}, o).run();
      }
});

// Rows beyond 2^31: two short sequences at the far end of a packed row.
const testing::Case kFar("indices beyond 2^31", [] {
  constexpr std::int64_t far = (std::int64_t{1} << 31) + 5, dim = 3;
  const std::size_t bytes = (far + 3) * dim * sizeof(float);
  testing::Sparse a(bytes), b(bytes), dh(bytes), h(bytes), da(bytes), db(bytes);
  for (const testing::Sparse* memory : {&a, &b, &dh, &h, &da, &db})
    if (!*memory) return std::puts("(skipped: the system grants no such address space)"), void();

  // the same three tokens near and far
  for (std::int64_t i = 0; i < 3 * dim; ++i)
    for (const testing::Sparse* memory : {&a, &b, &dh})
      memory->as<float>()[i] = memory->as<float>()[far * dim + i] = static_cast<float>(testing::uniform());
  Tensor final_state(DType::float32, 2, dim);
  const auto call = [&](const std::int64_t* offsets) {
    LinearScanForward f{};
    f.dtype = DType::float32, f.threads = 2;
    f.batch = 1, f.seqlen = offsets[2], f.dim = dim, f.nseq = 2;
    f.a = a.as<void>(), f.b = b.as<void>(), f.a_stride = f.b_stride = dim, f.cu_seqlens = offsets;
    f.h = h.as<void>(), f.final_state = final_state.data();
    SSMKIT_CPU(linear_scan_forward)(f);
    LinearScanBackward g{};
    static_cast<LinearScanParams&>(g) = f;
    g.dh = dh.as<void>(), g.dh_stride = dim, g.states = h.as<void>(), g.da = da.as<void>(), g.db = db.as<void>();
    SSMKIT_CPU(linear_scan_backward)(g);
    return final_state.values();
  };
  const std::int64_t near[] = {0, 2, 3}, offsets[] = {far, far + 2, far + 3};
  const std::vector<double> expected = call(near);
  if (call(offsets) != expected) testing::fail("final state of far rows");
  for (std::int64_t i = 0; i < 3 * dim; ++i)
    for (const testing::Sparse* memory : {&h, &da, &db})
      if (memory->as<float>()[i] != memory->as<float>()[far * dim + i])
        return testing::fail("far row " + std::to_string(i));
  for (std::int64_t i = 0; i < 3 * dim; ++i)
    if (h.as<float>()[i] == 0 || db.as<float>()[i] == 0) return testing::fail("nothing written at " + std::to_string(i));
});

}  // namespace
