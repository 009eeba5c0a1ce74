// A slice of lanes walks the image row by row, its states to the left in registers, those above read back from the row
// before. Backward walks from the far corner; what a row hands to the row above it lies in memory of the thread's own.
//
// Threads share the vectors of lanes.
#include "cpu/ssm2d_kernel.h"

#include "cpu/linear_scan_lanes.h"
#include "cpu/parallel.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

template <class K, class Slice>
void forward(const Ssm2dKernelForward& p, std::int64_t lanes, Slice slice) {
  using T = typename K::T;
  using V = typename K::V;
  const T* const A = static_cast<const T*>(p.A);
  const T* const B = static_cast<const T*>(p.B);
  T* const h = static_cast<T*>(p.h);
  T* const v = static_cast<T*>(p.v);
  const V zero(T(0)), one(T(1)), half(T(0.5));
  const V A1 = slice.get(A, 0), A2 = slice.get(A + lanes, 0);
  const V A3 = slice.get(A + 2 * lanes, 0), A4 = slice.get(A + 3 * lanes, 0);
  for (std::int64_t i = 0; i < p.height; ++i) {
    V left_h = zero, left_v = zero;
    for (std::int64_t j = 0; j < p.width; ++j) {
      const std::int64_t cell = (i * p.width + j) * lanes, above = cell - p.width * lanes;
      const V factor = i > 0 && j > 0 ? half : one;
      V now_h = factor * K::step(A1, left_h, K::step(A2, left_v, zero));
      V now_v = zero;
      if (i > 0) now_v = factor * K::step(A3, slice.get(h + above, 0), K::step(A4, slice.get(v + above, 0), zero));
      if (i == 0 && j == 0) now_h = slice.get(B, 0), now_v = slice.get(B + lanes, 0);
      slice.put(h + cell, 0, now_h);
      slice.put(v + cell, 0, now_v);
      left_h = now_h, left_v = now_v;
    }
  }
}

// gh and gv are the gradients of h and v:
//   gh_ij = dh_ij + c_{i,j+1} A1* gh_{i,j+1} + c_{i+1,j} A3* gv_{i+1,j}
//   gv_ij = dv_ij + c_{i,j+1} A2* gh_{i,j+1} + c_{i+1,j} A4* gv_{i+1,j}
// `below` holds c_{i+1,j} gv_{i+1,j}, a vector for each column. dA is summed by rows, then over the rows.
template <class K, class Slice>
void backward(const Ssm2dKernelBackward& p, std::int64_t lanes, Slice slice, typename K::T* below) {
  using T = typename K::T;
  using V = typename K::V;
  const T* const A = static_cast<const T*>(p.A);
  const T* const dh = static_cast<const T*>(p.dh);
  const T* const dv = static_cast<const T*>(p.dv);
  const T* const h = static_cast<const T*>(p.h);
  const T* const v = static_cast<const T*>(p.v);
  T* const dA = static_cast<T*>(p.dA);
  T* const dB = static_cast<T*>(p.dB);
  const V zero(T(0)), one(T(1)), half(T(0.5));
  const V A1 = slice.get(A, 0), A2 = slice.get(A + lanes, 0);
  const V A3 = slice.get(A + 2 * lanes, 0), A4 = slice.get(A + 3 * lanes, 0);
  V sums[4] = {zero, zero, zero, zero}, gh = zero, gv = zero;
  for (std::int64_t j = 0; j < p.width; ++j) store(below + j * V::size, zero);
  for (std::int64_t i = p.height - 1; i >= 0; --i) {
    V row[4] = {zero, zero, zero, zero}, right = zero;
    for (std::int64_t j = p.width - 1; j >= 0; --j) {
      const std::int64_t cell = (i * p.width + j) * lanes, left = cell - lanes, above = cell - p.width * lanes;
      const V under = load(below + j * V::size), factor = i > 0 && j > 0 ? half : one;
      gh = slice.get(dh + cell, 0) + K::times_conj(A1, right) + K::times_conj(A3, under);
      gv = slice.get(dv + cell, 0) + K::times_conj(A2, right) + K::times_conj(A4, under);
      right = factor * gh;
      const V up = factor * gv;
      store(below + j * V::size, up);
      if (j > 0) {
        row[0] += K::times_conj(slice.get(h + left, 0), right);
        row[1] += K::times_conj(slice.get(v + left, 0), right);
      }
      if (i > 0) {
        row[2] += K::times_conj(slice.get(h + above, 0), up);
        row[3] += K::times_conj(slice.get(v + above, 0), up);
      }
    }
    for (int k = 0; k < 4; ++k) sums[k] += row[k];
  }
  for (int k = 0; k < 4; ++k) slice.put(dA + k * lanes, 0, sums[k]);
  slice.put(dB, 0, gh), slice.put(dB + lanes, 0, gv);
}

// work(slice, begin, end) for slices of one vector of the lanes, counted in reals
template <class K, class P, class Work>
void for_lanes(const P& p, const Work& work) {
  const std::int64_t lanes = p.lanes * K::kReals;
  constexpr std::int64_t V = K::V::size;
  parallel_for((lanes + V - 1) / V, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    work(Columns{begin * V, end * V < lanes ? end * V : lanes}, lanes);
  });
}

// call(Kind) for the dtype
template <typename Call>
void with_kind(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::float64: return call(Kind<double, false>());
    case DType::complex64: return call(Kind<float, true>());
    case DType::complex128: return call(Kind<double, true>());
    default: return call(Kind<float, false>());
  }
}

}  // namespace

void ssm2d_kernel_forward(const Ssm2dKernelForward& p) {
  with_kind(p.dtype, [&](auto kind) {
    using K = decltype(kind);
    for_lanes<K>(p, [&](Columns columns, std::int64_t lanes) {
      for_slices<1, typename K::T>(columns, [&](auto slice) { forward<K>(p, lanes, slice); });
    });
  });
}

void ssm2d_kernel_backward(const Ssm2dKernelBackward& p) {
  with_kind(p.dtype, [&](auto kind) {
    using K = decltype(kind);
    for_lanes<K>(p, [&](Columns columns, std::int64_t lanes) {
      const Scratch<typename K::T> below(p.width * K::V::size);
      for_slices<1, typename K::T>(columns, [&](auto slice) { backward<K>(p, lanes, slice, below); });
    });
  });
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
