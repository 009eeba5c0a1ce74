// Matrix products of the size of a chunk, out of tiles that stay in registers.
//
//   for_tiles<T>(rows, cols, [&](auto shape, int row, int col) {
//     Tile<T, shape.rows, shape.vecs> tile;
//     tile.clear();
//     tile.add_columns(k, a + row, a_step, b + col, b_step);      // += A B
//     ...                                                         // then whatever uses it, before it leaves registers
//   });
//
// B and the result have rows that are padded to whole vectors: `padded` gives such a row length. A and B come in units
// (pairs.h), and `k` counts units.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/pairs.h"
#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// rows x 2 vectors of sums, 2 of B and one broadcast fit the 32 registers of AVX-512, or the 16 of the others
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVecs = 2;

template <int R, int V>
struct TileShape {
  static constexpr int rows = R, vecs = V;
};

// f(TileShape, row, col) for tiles that cover rows x cols; cols is rounded up to whole vectors. All rows of a column
// panel come one after another, so that the panel of B stays in the nearest cache.
template <int V, typename F>
SSMKIT_INLINE void for_tile_rows(int rows, int col, const F& f) {
  int row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) f(TileShape<kTileRows, V>(), row, col);
  if constexpr (kTileRows > 8)
    if (row + 8 <= rows) f(TileShape<8, V>(), row, col), row += 8;
  if (row + 4 <= rows) f(TileShape<4, V>(), row, col), row += 4;
  if (row + 2 <= rows) f(TileShape<2, V>(), row, col), row += 2;
  if (row < rows) f(TileShape<1, V>(), row, col);
}
template <typename T, typename F>
SSMKIT_INLINE void for_tiles(int rows, int cols, const F& f) {
  constexpr int lanes = Vec<T>::size;
  int col = 0;
  for (; col + lanes < cols; col += kTileVecs * lanes) for_tile_rows<kTileVecs>(rows, col, f);
  if (col < cols) for_tile_rows<1>(rows, col, f);
}

template <typename T, int R, int V>
struct Tile {
  static constexpr int lanes = Vec<T>::size;
  Vec<T> v[R][V];

  SSMKIT_INLINE void clear() {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) v[r][i] = Vec<T>(T(0));
  }

  // += A B over `count` terms; element (row r, term k) of A at a[k * a_step + r], row k of B at b + k * b_step
  template <typename U>
  SSMKIT_INLINE void add_columns(int count, const U* a, std::int64_t a_step, const U* b, std::int64_t b_step) {
    for (int k = 0; k < count; ++k, a += a_step, b += b_step) add_term(a, 1, b);
  }
  // the same with element (r, k) of A at a[r * a_row + k]
  template <typename U>
  SSMKIT_INLINE void add_rows(int count, const U* a, std::int64_t a_row, const U* b, std::int64_t b_step) {
    for (int k = 0; k < count; ++k, ++a, b += b_step) add_term(a, a_row, b);
  }

  // f(row, vector, sum) for each vector of sums; f may change the sum
  template <typename F>
  SSMKIT_INLINE void each(const F& f) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) f(r, i * lanes, v[r][i]);
  }

 private:
  template <typename U>
  SSMKIT_INLINE void add_term(const U* a, std::int64_t a_row, const U* b) {
    Operand<U> b_vec[V];
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) b_vec[i] = Operand<U>::each(b + i * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Operand<U> a_vec = Operand<U>::all(a + r * a_row);
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) v[r][i] = multiply_add(a_vec, b_vec[i], v[r][i]);
    }
  }
};

template <typename T>
constexpr int whole_vectors(int count) {
  return (count + Vec<T>::size - 1) / Vec<T>::size * Vec<T>::size;
}

// Elements from one row to the next: whole vectors, and an odd number of cache lines where a power of two would put many
// rows into the same few sets of the cache.
template <typename T>
constexpr int padded(int count) {
  constexpr int line = 64 / static_cast<int>(sizeof(T));
  const int whole = (count + line - 1) / line * line;
  return whole % (4 * line) ? whole : whole + line;
}

// The lanes of a and b in turn: the lower halves, or the upper ones.
template <typename T, bool kUpper>
SSMKIT_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  typename Vec<T>::Int pick;
  constexpr int lanes = Vec<T>::size;
  for (int i = 0; i < lanes; ++i) pick[i] = (kUpper ? lanes / 2 : 0) + i / 2 + (i % 2) * lanes;
#if defined(__clang__)
  typename Vec<T>::Reg result;
  for (int i = 0; i < lanes; ++i) result[i] = pick[i] < lanes ? a.v[pick[i]] : b.v[pick[i] - lanes];
  return result;
#else
  return __builtin_shuffle(a.v, b.v, pick);
#endif
}

// out[c][r] = in[r][c]; both with rows of whole vectors, which are read and written whole.
template <typename T>
inline void transpose(T* out, int out_step, const T* in, int in_step, int rows, int cols) {
  constexpr int lanes = Vec<T>::size;
  for (int r = 0; r < rows; r += lanes)
    for (int c = 0; c < cols; c += lanes) {
      Vec<T> x[lanes], y[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) x[i] = r + i < rows ? load(in + (r + i) * std::int64_t{in_step} + c) : Vec<T>(T(0));
      // a perfect shuffle of the rows with each round: after log2(lanes) of them rows are columns
#pragma GCC unroll 4
      for (int half = lanes; half > 1; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < lanes / 2; ++i) {
          y[2 * i] = interleave<T, false>(x[i], x[i + lanes / 2]);
          y[2 * i + 1] = interleave<T, true>(x[i], x[i + lanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) x[i] = y[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        if (c + i < cols) store(out + (c + i) * std::int64_t{out_step} + r, x[i]);
    }
}

template <typename U>
SSMKIT_INLINE void transpose_units(U* out, int out_step, const U* in, std::int64_t in_step, int rows, int cols) {
  // a pair has the size of a number, and no arithmetic touches it
  using T = std::conditional_t<std::is_same_v<U, Pair>, float, U>;
  transpose<T>(reinterpret_cast<T*>(out), out_step, reinterpret_cast<const T*>(in), static_cast<int>(in_step), rows, cols);
}

// One row of `count` elements in the type of sums, the rest of the last vector 0.
template <typename S>
SSMKIT_INLINE void widen_row(acc_t<S>* out, const S* in, int count) {
  constexpr int lanes = Vec<acc_t<S>>::size;
  int i = 0;
  for (; i + lanes <= count; i += lanes) store(out + i, load(in + i));
  if (i < count) store(out + i, load(in + i, count - i));
}
template <typename T>
SSMKIT_INLINE void clear_row(T* out, int count) {
  for (int i = 0; i < count; i += Vec<T>::size) store(out + i, Vec<T>(T(0)));
}
// `count` lanes of one vector, all of them if there are as many.
template <typename T>
SSMKIT_INLINE Vec<acc_t<T>> load_upto(const T* p, int count) {
  return count >= Vec<acc_t<T>>::size ? load(p) : load(p, count);
}
template <typename T>
SSMKIT_INLINE void store_upto(T* p, Vec<acc_t<T>> v, int count) {
  if (count >= Vec<acc_t<T>>::size)
    store(p, v);
  else
    store(p, v, count);
}
#if defined(SSMKIT_BF16)
template <>
SSMKIT_INLINE void store_upto(bfloat16* p, Vec<float> v, int count) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v.v));
  if (count >= Vec<float>::size)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
  else
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1u), rounded);
}
#endif

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
