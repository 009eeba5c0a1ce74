// Channels in lanes: reals, or complex numbers with re and im in neighbouring lanes; and slices of the columns.
// Widths, columns and strides count reals.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxVectors = 8;
#else
constexpr int kMaxVectors = 4;
#endif

// Lane i of the result is lane (i & keep) ^ flip of x.
template <typename T>
SSMKIT_INLINE Vec<T> permuted(Vec<T> x, int keep, int flip) {
#if defined(__GNUC__) && !defined(__clang__)
  typename Vec<T>::Int lanes;
  for (int i = 0; i < Vec<T>::size; ++i) lanes[i] = (i & keep) ^ flip;
  return __builtin_shuffle(x.v, lanes);
#else
  Vec<T> result;
  for (int i = 0; i < Vec<T>::size; ++i) result.v[i] = x.v[(i & keep) ^ flip];
  return result;
#endif
}
// `even` in the lanes of real parts, `odd` in those of imaginary parts.
template <typename T>
SSMKIT_INLINE Vec<T> alternating(T even, T odd) {
  typename Vec<T>::Reg lanes;
  for (int i = 0; i < Vec<T>::size; ++i) lanes[i] = i & 1 ? odd : even;
  return lanes;
}

template <typename Element, bool kComplex>
struct Kind {
  using In = Element;
  using T = acc_t<In>;
  using V = Vec<T>;
  static constexpr int kReals = kComplex ? 2 : 1;

  // (-im, im) of each number
  SSMKIT_INLINE static V turned(V a) { return permuted(a, ~1, 1) * alternating<T>(T(-1), T(1)); }
  SSMKIT_INLINE static V real(V a) { return permuted(a, ~1, 0); }
  SSMKIT_INLINE static V swapped(V a) { return permuted(a, ~0, 1); }

  // a h + b
  SSMKIT_INLINE static V step(V a, V h, V b) {
    if constexpr (kComplex) return fma(turned(a), swapped(h), fma(real(a), h, b));
    else return fma(a, h, b);
  }
  // conj(a) g
  SSMKIT_INLINE static V times_conj(V a, V g) {
    if constexpr (kComplex) return fnma(turned(a), swapped(g), real(a) * g);
    else return a * g;
  }
  SSMKIT_INLINE static V one() {
    if constexpr (kComplex) return alternating<T>(T(1), T(0));
    else return V(T(1));
  }
};

// ---- slices of columns --------------------------------------------------------------------------------------------

// kVectors whole vectors from a column on; a single one may have fewer than all its lanes.
template <int kVectorCount>
struct Slice {
  static constexpr int kVectors = kVectorCount;
  std::int64_t column;
  int lanes;

  template <typename P>
  SSMKIT_INLINE Vec<acc_t<P>> get(const P* row, int v) const {
    constexpr int size = Vec<acc_t<P>>::size;
    return kVectors > 1 || lanes == size ? load(row + column + v * size) : load(row + column, lanes);
  }
  template <typename P>
  SSMKIT_INLINE void put(P* row, int v, Vec<acc_t<P>> x) const {
    constexpr int size = Vec<acc_t<P>>::size;
    if (kVectors > 1 || lanes == size) store(row + column + v * size, x);
    else store(row + column, x, lanes);
  }
  // Brings this part of a row into the second cache.
  template <typename P>
  SSMKIT_INLINE void fetch(const P* row) const {
    const char* p = reinterpret_cast<const char*>(row + column);
    for (int line = 0; line < kVectors * static_cast<int>(Vec<acc_t<P>>::size * sizeof(P)); line += 64)
      __builtin_prefetch(p + line, 0, 2);
  }
};

struct Columns {
  std::int64_t begin, end;
};

// body(slice) for the columns in order, in slices of at most kVectors: as many of those as fit, then of 4, then of 1.
template <int kVectors, typename T, typename Body>
SSMKIT_INLINE void for_slices(Columns left, const Body& body) {
  constexpr std::int64_t V = Vec<T>::size, size = kVectors * V;
  for (; left.begin + size <= left.end; left.begin += size) body(Slice<kVectors>{left.begin, static_cast<int>(V)});
  if constexpr (kVectors > 1) for_slices<(kVectors > 4 ? 4 : 1), T>(left, body);
  else if (left.begin < left.end) body(Slice<1>{left.begin, static_cast<int>(left.end - left.begin)});
}

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
