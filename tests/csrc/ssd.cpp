// Runs ssd forward and backward under the address and undefined-behaviour sanitizers: awkward sizes, buffers that end
// where the tensors end. Compiled and run by test_ssd_sanitized.py for one capability at a time.
#include "cpu/ssd.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using ssmkit::DType;

std::size_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Small numbers of any dtype on the heap, exactly as many as asked for.
class Tensor {
 public:
  Tensor(DType dtype, std::int64_t count, double scale = 1.0, double shift = 0.0) : dtype_(dtype), count_(count) {
    data_.reset(static_cast<unsigned char*>(std::malloc(count * bytes_of(dtype))));
    for (std::int64_t i = 0; i < count; ++i) put(i, shift + scale * (std::rand() % 2001 - 1000) / 1000.0);
  }
  void* get() const { return data_.get(); }
  bool finite() const {
    for (std::int64_t i = 0; i < count_; ++i) {
      if (dtype_ == DType::float32 && !std::isfinite(reinterpret_cast<float*>(data_.get())[i])) return false;
      if (dtype_ == DType::float64 && !std::isfinite(reinterpret_cast<double*>(data_.get())[i])) return false;
    }
    return true;
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  void put(std::int64_t i, double value) {
    const float narrow = static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    const std::uint16_t brain = static_cast<std::uint16_t>(bits >> 16);
    // sign and mantissa of the number under one exponent: halves of 1/2 to 1 suffice here
    const std::uint16_t half = static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | 0x3800u | (bits >> 13 & 0x3ffu));
    if (dtype_ == DType::float64) std::memcpy(data_.get() + 8 * i, &value, 8);
    if (dtype_ == DType::float32) std::memcpy(data_.get() + 4 * i, &narrow, 4);
    if (dtype_ == DType::bfloat16) std::memcpy(data_.get() + 2 * i, &brain, 2);
    if (dtype_ == DType::float16) std::memcpy(data_.get() + 2 * i, &half, 2);
  }
  DType dtype_;
  std::int64_t count_;
  std::unique_ptr<unsigned char, Free> data_;
};

struct Case {
  std::int64_t batch, seqlen, nheads, headdim, ngroups, dstate;
  int chunk, threads;
  bool reverse, flags, packed, wide;
};

bool run(const Case& c, DType dtype) {
  const DType real = dtype == DType::float64 ? DType::float64 : DType::float32;
  const DType out = c.wide ? real : dtype;
  const std::int64_t rows = c.batch * c.seqlen, inner = c.nheads * c.headdim, weights = c.ngroups * c.dstate;
  const std::vector<std::int64_t> offsets{0, c.seqlen / 3, c.seqlen / 3, c.seqlen};
  const std::int64_t nseq = c.packed ? 3 : c.batch, states = nseq * inner * c.dstate;
  const std::int64_t slots = c.packed ? c.seqlen / c.chunk + nseq : c.batch * ((c.seqlen + c.chunk - 1) / c.chunk);
  std::vector<std::uint8_t> flags(rows);
  for (auto& flag : flags) flag = static_cast<std::uint8_t>(std::rand() % 8 ? 0 : std::rand() % 4);

  Tensor x(dtype, rows * inner), dt(dtype, rows * c.nheads), B(dtype, rows * weights), C(dtype, rows * weights);
  Tensor z(dtype, rows * inner), A(real, c.nheads, 0.5, -1.0), D(real, inner), bias(real, c.nheads);
  Tensor initial(real, states), y(out, rows * inner), final_state(real, states), addend(real, rows * inner);
  Tensor checkpoints(real, slots * inner * c.dstate), ungated(real, rows * inner);

  ssmkit::SsdForward f;
  f.dtype = dtype, f.dt_softplus = true, f.reverse = c.reverse, f.wide = c.wide, f.threads = c.threads, f.chunk = c.chunk;
  f.batch = c.batch, f.seqlen = c.seqlen, f.nheads = c.nheads, f.headdim = c.headdim, f.ngroups = c.ngroups;
  f.dstate = c.dstate, f.nseq = nseq, f.dt_min = 0.0, f.dt_max = HUGE_VAL;
  f.x = x.get(), f.dt = dt.get(), f.B = B.get(), f.C = C.get(), f.z = z.get(), f.A = A.get(), f.D = D.get();
  f.dt_bias = bias.get(), f.initial_state = initial.get();
  f.flags = c.flags ? flags.data() : nullptr, f.cu_seqlens = c.packed ? offsets.data() : nullptr;
  f.x_stride = f.z_stride = inner, f.dt_stride = c.nheads, f.B_stride = f.C_stride = weights;
  f.addend = c.wide ? addend.get() : nullptr, f.y = y.get(), f.final_state = final_state.get();
  f.checkpoints = checkpoints.get(), f.ungated = ungated.get();
  SSMKIT_CPU(ssd_forward)(f);

  Tensor dy(dtype, rows * inner), dfinal(real, states), dx(out, rows * inner), ddt(out, rows * c.nheads);
  Tensor dB(out, rows * weights), dC(out, rows * weights), dz(out, rows * inner), dA(real, c.nheads), dD(real, inner);
  Tensor dbias(real, c.nheads), dinitial(real, states);
  ssmkit::SsdBackward b;
  static_cast<ssmkit::SsdParams&>(b) = f;
  b.dy = dy.get(), b.dfinal_state = dfinal.get(), b.checkpoints = checkpoints.get(), b.ungated = ungated.get();
  b.dy_stride = inner, b.dx = dx.get(), b.ddt = ddt.get(), b.dB = dB.get(), b.dC = dC.get(), b.dz = dz.get();
  b.dA = dA.get(), b.dD = dD.get(), b.ddt_bias = dbias.get(), b.dinitial_state = dinitial.get();
  SSMKIT_CPU(ssd_backward)(b);

  for (const Tensor* t : {&y, &final_state, &dx, &ddt, &dB, &dC, &dz, &dA, &dD, &dbias, &dinitial})
    if (!t->finite()) return false;
  return true;
}

}  // namespace

int main(int, char** arguments) {
  if (const char* refusal = ssmkit::set_cpu_capability(arguments[1])) {
    std::printf("%s: %s\n", arguments[1], refusal);
    return 2;
  }
  const Case cases[] = {
      {1, 1, 1, 1, 1, 1, 64, 1, false, false, false, false},
      {2, 65, 4, 33, 2, 17, 64, 2, false, true, false, false},
      {1, 37, 3, 7, 3, 5, 16, 1, true, true, false, true},
      {1, 130, 6, 16, 2, 32, 7, 3, true, true, true, false},
      {1, 90, 1, 20, 1, 9, 13, 5, false, false, false, false},
      {1, 300, 2, 8, 1, 3, 256, 1, false, true, true, true},
  };
  for (const Case& c : cases)
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
      if (!run(c, dtype)) {
        std::printf("not finite: case %td, dtype %d\n", &c - cases, static_cast<int>(dtype));
        return 1;
      }
  return 0;
}
