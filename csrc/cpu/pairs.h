// Operands of matrix products, in units of what one multiply-add takes from a lane: one number of the type of sums, or a
// pair of bfloat16 numbers, neighbours along the summed axis, in the variant for CPUs that have their dot product (SSMKIT_BF16).
//
//   kTerms<U>                  numbers along the summed axis in a unit
//   units<U>(count)            units that `count` numbers take; the last may be half empty, then it ends with a 0
//   multiply_add(a, b, sum)    of a unit for all lanes and one for each lane
//   Units                      out of rows of sums: pairs within a row, or of rows 2i and 2i + 1
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

struct Pair {
  std::uint16_t first, second;
};

template <typename U> constexpr int kTerms = 1;
template <> constexpr int kTerms<Pair> = 2;

template <typename U>
constexpr int units(int count) {
  return (count + kTerms<U> - 1) / kTerms<U>;
}

template <typename T>
struct Operand {
  Vec<T> v;
  static SSMKIT_INLINE Operand all(const T* p) { return {Vec<T>(*p)}; }
  static SSMKIT_INLINE Operand each(const T* p) { return {load(p)}; }
};
template <typename T>
SSMKIT_INLINE Vec<T> multiply_add(Operand<T> a, Operand<T> b, Vec<T> sum) {
  return fma(a.v, b.v, sum);
}

// Rows of T as rows of units: the same memory where a unit is a number, else memory of its own, filled when asked.
template <typename T, typename U>
struct Units;
template <typename T>
struct Units<T, T> {
  const T* data;

  Units(const T* rows, std::int64_t, std::int64_t) : data(rows) {}
  void along_rows(const T* in, std::int64_t, int, int) { data = in; }
  void along_columns(const T* in, std::int64_t, int, int) { data = in; }
};

#if defined(SSMKIT_BF16)

template <>
struct Operand<Pair> {
  __m512i v;
  static SSMKIT_INLINE Operand all(const Pair* p) {
    std::int32_t both;
    std::memcpy(&both, p, 4);
    return {_mm512_set1_epi32(both)};
  }
  static SSMKIT_INLINE Operand each(const Pair* p) { return {_mm512_loadu_si512(p)}; }
};
SSMKIT_INLINE Vec<float> multiply_add(Operand<Pair> a, Operand<Pair> b, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
}

// Rounded to nearest even: the numbers of `low` in turn, then those of `high`.
SSMKIT_INLINE __m512i narrow(Vec<float> low, Vec<float> high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
}
// Each lane's pair.
SSMKIT_INLINE void store(Pair* p, Vec<float> first, Vec<float> second) {
  alignas(64) static constexpr std::uint16_t kTurn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i turn = _mm512_load_si512(kTurn);
  _mm512_storeu_si512(p, _mm512_maskz_permutexvar_epi16(0xffffffffu, turn, narrow(first, second)));
}

template <>
struct Units<float, Pair> {
  Scratch<Pair> data;
  std::int64_t step;

  Units(const float*, std::int64_t rows, std::int64_t step) : data(rows * step), step(step) {}

  // `rows` rows of `cols` numbers; beyond these, up to whole vectors, there are zeros
  void along_rows(const float* in, std::int64_t in_step, int rows, int cols) {
    constexpr int lanes = Vec<float>::size;
    const auto from = [cols](const float* row, int c) {
      if (c + lanes <= cols) return load(row + c);
      return c < cols ? load(row + c, cols - c) : Vec<float>(0.0f);
    };
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; c += 2 * lanes)
        _mm512_storeu_si512(data + r * step + c / 2, narrow(from(in + r * in_step, c), from(in + r * in_step, c + lanes)));
  }
  // `rows` rows of whole vectors, the last paired with zeros where their number is odd
  void along_columns(const float* in, std::int64_t in_step, int rows, int cols) {
    for (int r = 0; r < rows; r += 2)
      for (int c = 0; c < cols; c += Vec<float>::size) {
        const float* at = in + r * in_step + c;
        store(data + r / 2 * step + c, load(at), r + 1 < rows ? load(at + in_step) : Vec<float>(0.0f));
      }
  }
};

#endif

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
