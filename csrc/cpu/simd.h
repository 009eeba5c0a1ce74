// The SIMD vocabulary of all CPU kernels: Vec<float> and Vec<double> of the native width of the capability this file
// is compiled for. GCC's vector extensions carry the arithmetic; intrinsics stand only where they say more.
//
//   load(p) load(p, count)      whole vector; the first `count` lanes, the others 0, nothing read beyond them
//   store(p, v) store(p, v, n)  the same; to bfloat16 and float16 with round to nearest even
//   fma(a, b, c) = a b + c      fnma(a, b, c) = c - a b
// The all-ones masks of some intrinsics only keep GCC from warning of its own undefined operand.
//   exp2 exp softplus sigmoid silu sqrt abs max min sum (exponentials: simd_math.h)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define SSMKIT_INLINE inline __attribute__((always_inline))

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T> struct Lanes;
template <> struct Lanes<float> {
  typedef float Reg __attribute__((vector_size(kVectorBytes)));
  typedef std::int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef std::uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
};
template <> struct Lanes<double> {
  typedef double Reg __attribute__((vector_size(kVectorBytes)));
  typedef std::int64_t Int __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
struct Vec {
  using Reg = typename Lanes<T>::Reg;
  using Int = typename Lanes<T>::Int;
  static constexpr int size = kVectorBytes / static_cast<int>(sizeof(T));

  Reg v;

  Vec() = default;
  SSMKIT_INLINE Vec(Reg reg) : v(reg) {}
  SSMKIT_INLINE Vec(T value) : v(value - Reg{}) {}  // -0 stays -0

  SSMKIT_INLINE T operator[](int lane) const { return v[lane]; }
};

template <typename T> SSMKIT_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) { return a.v + b.v; }
template <typename T> SSMKIT_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) { return a.v - b.v; }
template <typename T> SSMKIT_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) { return a.v * b.v; }
template <typename T> SSMKIT_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) { return a.v / b.v; }
template <typename T> SSMKIT_INLINE Vec<T> operator-(Vec<T> a) { return -a.v; }
template <typename T> SSMKIT_INLINE Vec<T>& operator+=(Vec<T>& a, Vec<T> b) { return a = a + b; }

// ---- multiply-add, comparison -------------------------------------------------------------------------------------

SSMKIT_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a.v, b.v, c.v);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a.v, b.v, c.v);
#else
  return a.v * b.v + c.v;
#endif
}
SSMKIT_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a.v, b.v, c.v);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a.v, b.v, c.v);
#else
  return a.v * b.v + c.v;
#endif
}
SSMKIT_INLINE Vec<float> fnma(Vec<float> a, Vec<float> b, Vec<float> c) { return fma(-a, b, c); }
SSMKIT_INLINE Vec<double> fnma(Vec<double> a, Vec<double> b, Vec<double> c) { return fma(-a, b, c); }

// max(a, b) and min(a, b) give b where either is NaN.
SSMKIT_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a.v, b.v);
#elif defined(__AVX2__)
  return _mm256_max_ps(a.v, b.v);
#elif defined(__SSE2__)
  return _mm_max_ps(a.v, b.v);
#else
  return a.v > b.v ? a.v : b.v;
#endif
}
SSMKIT_INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, a.v, b.v);
#elif defined(__AVX2__)
  return _mm256_min_ps(a.v, b.v);
#elif defined(__SSE2__)
  return _mm_min_ps(a.v, b.v);
#else
  return a.v < b.v ? a.v : b.v;
#endif
}
SSMKIT_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return a.v > b.v ? a.v : b.v; }
SSMKIT_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return a.v < b.v ? a.v : b.v; }

// Lane by lane a > b ? yes : no.
template <typename T>
SSMKIT_INLINE Vec<T> select_greater(Vec<T> a, Vec<T> b, Vec<T> yes, Vec<T> no) {
  return a.v > b.v ? yes.v : no.v;
}
template <typename T>
SSMKIT_INLINE Vec<T> abs(Vec<T> a) {
  return max(a, -a);
}
SSMKIT_INLINE Vec<float> sqrt(Vec<float> a) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, a.v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(a.v);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(a.v);
#else
  for (int i = 0; i < Vec<float>::size; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
#endif
}
SSMKIT_INLINE Vec<double> sqrt(Vec<double> a) {
  for (int i = 0; i < Vec<double>::size; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
}

// Sum over the lanes: halves added onto halves, always in this order.
template <typename T>
SSMKIT_INLINE T sum(Vec<T> a) {
  T lane[Vec<T>::size];
  std::memcpy(lane, &a.v, sizeof lane);
  for (int half = Vec<T>::size / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// The sums of as many vectors as there are lanes, vector i at p + i * stride, in lane i.
template <typename T>
SSMKIT_INLINE Vec<T> sum_rows(const T* p, std::int64_t stride) {
  Vec<T> result;
  for (int i = 0; i < Vec<T>::size; ++i) {
    Vec<T> row;
    std::memcpy(&row.v, p + i * stride, kVectorBytes);
    result.v[i] = sum(row);
  }
  return result;
}
#if defined(__AVX512F__)
template <>
SSMKIT_INLINE Vec<float> sum_rows(const float* p, std::int64_t stride) {
  // fours of rows to sums per quarter, then the quarters to one vector
  __m512 quarter[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* row = p + 4 * i * stride;
    const __m512 a = _mm512_loadu_ps(row), b = _mm512_loadu_ps(row + stride);
    const __m512 c = _mm512_loadu_ps(row + 2 * stride), d = _mm512_loadu_ps(row + 3 * stride);
    const __m512 ab = _mm512_maskz_unpacklo_ps(0xffff, a, b) + _mm512_maskz_unpackhi_ps(0xffff, a, b);
    const __m512 cd = _mm512_maskz_unpacklo_ps(0xffff, c, d) + _mm512_maskz_unpackhi_ps(0xffff, c, d);
    quarter[i] = _mm512_maskz_shuffle_ps(0xffff, ab, cd, 0x44) + _mm512_maskz_shuffle_ps(0xffff, ab, cd, 0xee);
  }
  const __m512 low = _mm512_maskz_shuffle_f32x4(0xffff, quarter[0], quarter[1], 0x44) +
                     _mm512_maskz_shuffle_f32x4(0xffff, quarter[0], quarter[1], 0xee);
  const __m512 high = _mm512_maskz_shuffle_f32x4(0xffff, quarter[2], quarter[3], 0x44) +
                      _mm512_maskz_shuffle_f32x4(0xffff, quarter[2], quarter[3], 0xee);
  return _mm512_maskz_shuffle_f32x4(0xffff, low, high, 0x88) + _mm512_maskz_shuffle_f32x4(0xffff, low, high, 0xdd);
}
#elif defined(__AVX2__)
template <>
SSMKIT_INLINE Vec<float> sum_rows(const float* p, std::int64_t stride) {
  __m256 half[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const float* row = p + 4 * i * stride;
    const __m256 a = _mm256_loadu_ps(row), b = _mm256_loadu_ps(row + stride);
    const __m256 c = _mm256_loadu_ps(row + 2 * stride), d = _mm256_loadu_ps(row + 3 * stride);
    const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    half[i] = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  }
  return _mm256_permute2f128_ps(half[0], half[1], 0x20) + _mm256_permute2f128_ps(half[0], half[1], 0x31);
}
#endif

// ---- half precision -----------------------------------------------------------------------------------------------

SSMKIT_INLINE float to_float(bfloat16 value) {
  const std::uint32_t bits = std::uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
SSMKIT_INLINE float to_float(float16 value) {
  const std::uint32_t sign = std::uint32_t{value.bits} >> 15 << 31;
  const std::uint32_t exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  std::uint32_t bits = sign | (exponent + 112) << 23 | mantissa << 13;
  if (exponent == 31) bits = sign | 0x7f800000u | mantissa << 13;
  float result;
  if (exponent == 0) {
    // a multiple of 2^-24, exact in float
    result = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -result : result;
  }
  std::memcpy(&result, &bits, 4);
  return result;
}
SSMKIT_INLINE float to_float(float value) { return value; }
SSMKIT_INLINE double to_float(double value) { return value; }

SSMKIT_INLINE void from_float(bfloat16* out, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<std::uint16_t>(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
SSMKIT_INLINE void from_float(float16* out, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else if (magnitude > 0x33000000u) {
    // below 2^-14: a multiple of 2^-24, rounded by hand
    const std::uint32_t shift = 126u - (magnitude >> 23), full = (magnitude & 0x7fffffu) | 0x800000u;
    const std::uint32_t rest = full & ((1u << shift) - 1u), middle = 1u << (shift - 1u);
    half = full >> shift;
    half += rest > middle || (rest == middle && (half & 1u));
  } else {
    half = 0;  // 2^-25 and below
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
}
SSMKIT_INLINE void from_float(float* out, float value) { *out = value; }
SSMKIT_INLINE void from_float(double* out, double value) { *out = value; }

// ---- memory -------------------------------------------------------------------------------------------------------

template <typename T>
SSMKIT_INLINE Vec<T> load(const T* p) {
  Vec<T> a;
  std::memcpy(&a.v, p, kVectorBytes);
  return a;
}
SSMKIT_INLINE Vec<float> load(const bfloat16* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Lanes<float>::Reg>(reinterpret_cast<Lanes<float>::Bits>(wide) << 16);
#else
  Lanes<float>::Half half;
  std::memcpy(&half, p, sizeof half);
  const auto bits = __builtin_convertvector(half, Lanes<float>::Bits) << 16;
  return reinterpret_cast<Lanes<float>::Reg>(bits);
#endif
}
SSMKIT_INLINE Vec<float> load(const float16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> a;
  for (int i = 0; i < Vec<float>::size; ++i) a.v[i] = to_float(p[i]);
  return a;
#endif
}

template <typename T>
SSMKIT_INLINE void store(T* p, Vec<T> a) {
  std::memcpy(p, &a.v, kVectorBytes);
}
SSMKIT_INLINE void store(bfloat16* p, Vec<float> a) {
  using Bits = Lanes<float>::Bits;
  const Bits bits = reinterpret_cast<Bits>(a.v);
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Bits nan = bits >> 16 | 0x40u;
  const Bits result = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  const auto half = __builtin_convertvector(result, Lanes<float>::Half);
  std::memcpy(p, &half, sizeof half);
}
SSMKIT_INLINE void store(float16* p, Vec<float> a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, a.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < Vec<float>::size; ++i) from_float(p + i, a.v[i]);
#endif
}

// The first `count` lanes, count < size; through a buffer where there is no masked access.
#if defined(__AVX512F__)
SSMKIT_INLINE Vec<float> load(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
}
SSMKIT_INLINE Vec<double> load(const double* p, int count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), p);
}
SSMKIT_INLINE void store(float* p, Vec<float> a, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), a.v);
}
SSMKIT_INLINE void store(double* p, Vec<double> a, int count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1u), a.v);
}
#endif
template <typename T>
SSMKIT_INLINE Vec<acc_t<T>> load(const T* p, int count) {
  T lane[Vec<acc_t<T>>::size] = {};
  std::memcpy(lane, p, static_cast<std::size_t>(count) * sizeof(T));
  return load(lane);
}
template <typename T>
SSMKIT_INLINE void store(T* p, Vec<acc_t<T>> a, int count) {
  T lane[Vec<acc_t<T>>::size];
  store(lane, a);
  std::memcpy(p, lane, static_cast<std::size_t>(count) * sizeof(T));
}

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY

#include "cpu/simd_math.h"
