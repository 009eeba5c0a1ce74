// One selective scan after the other, each over views: nothing is laid out per path. What all paths share (y, dx, dz) is
// added up in their order: in place where it is of the states' dtype, else in a sum of that dtype until the last path.
#include "cpu/cross_selective_scan.h"

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/walk.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Address of an array's element; null stays null.
template <typename T>
T* element(T* base, std::int64_t index, std::int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return base ? static_cast<Byte*>(base) + index * bytes : nullptr;
}

class Paths {
 public:
  explicit Paths(const CrossSelectiveScanParams& p)
      : p_(p), input_(p.dtype == DType::float64 ? 8 : p.dtype == DType::float32 ? 4 : 2),
        real_(p.dtype == DType::float64 ? 8 : 4), final_(p.batch * p.dim * p.dstate * real_) {}

  // What path k hands to selective_scan.
  void describe(SelectiveScanParams& s, std::int64_t k) const {
    const ScanPathTables& path = p_.paths[k];
    s.dtype = p_.dtype, s.complex_state = false, s.dt_softplus = p_.dt_softplus;
    s.reverse = path.reverse, s.threads = p_.threads;
    s.batch = s.nseq = p_.batch, s.seqlen = p_.seqlen, s.dim = p_.dim, s.dstate = p_.dstate;
    s.B_groups = p_.B_groups, s.C_groups = p_.C_groups;
    s.x = p_.x, s.z = p_.z;
    s.dt = input(p_.dt, k * p_.dt_path), s.B = input(p_.B, k * p_.B_path), s.C = input(p_.C, k * p_.C_path);
    s.A = real(p_.A, k * p_.dim * p_.dstate), s.D = real(p_.D, k * p_.dim), s.dt_bias = real(p_.dt_bias, k * p_.dim);
    s.dt_rank = p_.dt_rank, s.dt_weight = real(p_.dt_weight, k * p_.dim * p_.dt_rank);
    s.initial_state = nullptr, s.order = path.order, s.flags = path.flags, s.cu_seqlens = nullptr;
    s.x_stride = p_.x_stride, s.dt_stride = p_.dt_stride, s.z_stride = p_.z_stride;
    s.B_stride = p_.B_stride, s.C_stride = p_.C_stride;
  }

  template <typename T> T* input(T* base, std::int64_t index) const { return element(base, index, input_); }
  template <typename T> T* real(T* base, std::int64_t index) const { return element(base, index, real_); }
  template <typename T> T* checkpoints(T* base, std::int64_t k) const {
    return real(base, k * p_.batch * ((p_.seqlen + kChunk - 1) / kChunk) * p_.dstate * p_.dim);
  }
  void* final_state() const { return final_; }  // of a path, which nobody reads

  // How path k adds to an output in `sum`, of sum_size() bytes.
  RunningSum running(void* out, void* sum, std::int64_t k) const {
    RunningSum running;
    if (k > 0) running.before = narrow() ? sum : out;
    if (narrow() && k + 1 < p_.npaths) running.after = sum;
    return running;
  }
  std::int64_t sum_size() const { return narrow() && p_.npaths > 1 ? p_.batch * p_.seqlen * p_.dim * real_ : 0; }

 private:
  bool narrow() const { return input_ < real_; }

  const CrossSelectiveScanParams& p_;
  const std::int64_t input_, real_;  // bytes of a number
  Scratch<char> final_;
};

}  // namespace

void cross_selective_scan_forward(const CrossSelectiveScanForward& p) {
  const Paths paths(p);
  const Scratch<char> sum(p.merged ? paths.sum_size() : 0);
  for (std::int64_t k = 0; k < p.npaths; ++k) {
    SelectiveScanForward s;
    paths.describe(s, k);
    s.y = p.merged ? p.y : paths.input(p.y, k * p.dim);
    s.y_stride = p.merged ? p.dim : p.npaths * p.dim;
    if (p.merged) s.y_sum = paths.running(p.y, sum, k);
    s.final_state = paths.final_state(), s.checkpoints = paths.checkpoints(p.checkpoints, k);
    selective_scan_forward(s);
  }
}

void cross_selective_scan_backward(const CrossSelectiveScanBackward& p) {
  const Paths paths(p);
  const Scratch<char> dx_sum(paths.sum_size()), dz_sum(p.z ? paths.sum_size() : 0);
  const std::int64_t B_size = p.B_groups * p.dstate, C_size = p.C_groups * p.dstate;
  const std::int64_t dt_size = p.dt_rank ? p.dt_rank : p.dim;
  for (std::int64_t k = 0; k < p.npaths; ++k) {
    SelectiveScanBackward s;
    paths.describe(s, k);
    s.checkpoints = paths.checkpoints(p.checkpoints, k);
    s.dy = paths.input(p.dy, k * p.dy_path), s.dy_stride = p.dy_stride, s.dfinal_state = nullptr;
    s.dx = p.dx, s.dx_sum = paths.running(p.dx, dx_sum, k);
    s.dz = p.dz, s.dz_sum = paths.running(p.dz, dz_sum, k);
    s.ddt = paths.input(p.ddt, k * dt_size), s.ddt_stride = p.npaths * dt_size;
    s.ddt_weight = paths.real(p.ddt_weight, k * p.dim * p.dt_rank);
    s.dB = paths.input(p.dB, k * B_size), s.dB_stride = p.npaths * B_size;
    s.dC = paths.input(p.dC, k * C_size), s.dC_stride = p.npaths * C_size;
    s.dA = paths.real(p.dA, k * p.dim * p.dstate);
    s.dD = paths.real(p.dD, k * p.dim), s.ddt_bias = paths.real(p.ddt_bias, k * p.dim);
    s.dinitial_state = nullptr;
    selective_scan_backward(s);
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
