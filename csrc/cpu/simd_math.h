// Exponentials and what is made of them, for simd.h. Denormal results count as zero.
#pragma once

#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// ---- 2^x in float ---------------------------------------------------------------------------------------------------
//
// x = k / K + f with |f| <= 1 / 2K. Adding kSplit to x leaves k in the low bits of the sum. 2^(k mod K / K) comes from a
// table in one register, 2^f from a polynomial that is exactly 1 at 0 (a step of length zero keeps the state).

#if defined(__AVX512F__)
constexpr float kSplit = 0x1.8p19f;  // K = 16
// 2^(k / 16)
alignas(64) constexpr float kTable[16] = {
    1.00000000f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
    1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
// The relative rounding error of each: left out, steps of one length would err in one direction at every token.
alignas(64) constexpr float kTableRest[16] = {
    0.0f, 4.6285e-08f, -1.1992e-08f, 4.7298e-08f, 3.1934e-08f, 3.6211e-08f, -3.0991e-08f, -7.4752e-09f,
    1.7114e-08f, -3.0477e-08f, 5.2333e-09f, 6.1076e-09f, -1.4720e-08f, -5.2588e-09f, -6.1283e-09f, 5.1406e-09f};
#elif defined(__AVX2__)
constexpr float kSplit = 0x1.8p20f + 127.0f;  // K = 8
// 2^(k / 8) / (1 + k / 8): shifted into place, the bits of k make a factor 2^whole (1 + k mod 8 / 8)
alignas(32) constexpr float kTable[8] = {1.000000000f, 0.969340205f, 0.951365709f, 0.943156064f,
                                         0.942809045f, 0.949052811f, 0.961024463f, 0.978137672f};
alignas(32) constexpr float kTableRest[8] = {
    0.0f, 1.6723e-09f, -1.8187e-08f, -2.5246e-08f, -3.9592e-09f, 5.2333e-09f, 1.1861e-08f, -2.6441e-08f};
#else
constexpr float kSplit = 0x1.8p23f + 127.0f;  // K = 1
#endif

// 2^(k / K + f), from `split` = kSplit + k / K.
SSMKIT_INLINE Vec<float> power_of_two(Vec<float> split, Vec<float> f) {
#if defined(__AVX512F__)
  // minimax of the relative error on |f| <= 1/32, 1.6e-9
  Vec<float> p = fma(f, 5.5502136e-2f, 2.4023429e-1f);
  p = fma(f, p, 6.9314718e-1f);
  const __m512i k = _mm512_castps_si512(split.v);
  const Vec<float> power = _mm512_maskz_permutexvar_ps(0xffff, k, load(kTable).v);
  p = fma(f, p, Vec<float>(_mm512_maskz_permutexvar_ps(0xffff, k, load(kTableRest).v)));
  return _mm512_maskz_scalef_ps(0xffff, fma(power, p, power).v, (split - Vec<float>(kSplit)).v);
#elif defined(__AVX2__)
  // 2.5e-8 on |f| <= 1/16
  Vec<float> p = fma(f, 5.5496222e-2f, 2.4025763e-1f);
  p = fma(f, p, 6.9314721e-1f);
  const __m256i k = _mm256_castps_si256(split.v);
  const Vec<float> power = _mm256_permutevar8x32_ps(load(kTable).v, k);
  p = fma(f, p, Vec<float>(_mm256_permutevar8x32_ps(load(kTableRest).v, k)));
  return fma(power, p, power) * Vec<float>(_mm256_castsi256_ps(_mm256_slli_epi32(k, 20)));
#else
  // 2.0e-9 on |f| <= 1/2; an exponent field of 0 makes 0, of 255 infinity
  Vec<float> p = fma(f, 1.5353362e-4f, 1.3398874e-3f);
  p = fma(f, p, 9.6184374e-3f);
  p = fma(f, p, 5.5503325e-2f);
  p = fma(f, p, 2.4022648e-1f);
  p = fma(f, p, 6.9314720e-1f);
  const auto bits = reinterpret_cast<Lanes<float>::Bits>(split.v) << 23;
  return fma(f, p, 1.0f).v * reinterpret_cast<Lanes<float>::Reg>(bits);
#endif
}

// 2^x, relative error 1.1e-7 with AVX-512, 1.5e-7 otherwise.
SSMKIT_INLINE Vec<float> exp2(Vec<float> x) {
#if !defined(__AVX512F__)
  x = max(Vec<float>(-127.0f), min(Vec<float>(128.0f), x));
#endif
  const Vec<float> split = x + Vec<float>(kSplit);
  return power_of_two(split, x - (split - Vec<float>(kSplit)));
}

template <typename T> constexpr T kLog2e = static_cast<T>(1.44269504088896340736);
template <typename T> constexpr T kLn2 = static_cast<T>(0.693147180559945309417);

// e^x, the argument reduced in two parts so that the error does not grow with |x|.
SSMKIT_INLINE Vec<float> exp(Vec<float> x) {
#if defined(__AVX512F__)
  x = max(Vec<float>(-104.0f), min(Vec<float>(89.0f), x));
#else
  x = max(Vec<float>(-88.02969f), min(Vec<float>(88.72284f), x));
#endif
  const Vec<float> log2e(kLog2e<float>), split = fma(x, log2e, kSplit), whole = split - Vec<float>(kSplit);
#if defined(__AVX2__)
  const Vec<float> f = fma(x, 1.92596299e-8f, fma(x, log2e, -whole));
#else
  // without a fused multiply-add: ln 2 to 14 bits, whose product with a whole number is exact, and the rest
  const Vec<float> f = fnma(whole, 1.42860677e-6f, fnma(whole, 0x1.62e4p-1f, x)) * log2e;
#endif
  return power_of_two(split, f);
}

// ---- in double ------------------------------------------------------------------------------------------------------

// 2^n 2^f for a whole number n and |f| <= 1/2.
SSMKIT_INLINE Vec<double> power_of_two_at(Vec<double> n, Vec<double> f) {
  // ln(2)^k / k!, remainder below 5e-18
  constexpr double c[] = {6.9314718055994529e-1, 2.4022650695910069e-1,  5.5504108664821576e-2,  9.6181291076284769e-3,
                          1.3333558146428443e-3, 1.5403530393381606e-4,  1.5252733804059841e-5,  1.3215486790144307e-6,
                          1.0178086009239699e-7, 7.0549116208011229e-9,  4.4455382718708112e-10, 2.5678435993488200e-11,
                          1.3691488853904124e-12};
  Vec<double> p(c[12]);
#pragma GCC unroll 12
  for (int k = 11; k >= 0; --k) p = fma(f, p, c[k]);
  p = fma(f, p, 1.0);
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_pd(0xff, p.v, n.v);
#else
  typedef std::uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits bits = reinterpret_cast<Bits>((n + Vec<double>(0x1.8p52 + 1023.0)).v) << 52;
  return p.v * reinterpret_cast<Lanes<double>::Reg>(bits);
#endif
}

SSMKIT_INLINE Vec<double> nearest(Vec<double> x) {
  const Vec<double> shift(0x1.8p52);
  return (x + shift) - shift;
}

// 2^x, relative error 2e-16.
SSMKIT_INLINE Vec<double> exp2(Vec<double> x) {
  x = max(Vec<double>(-1023.0), min(Vec<double>(1024.0), x));
  const Vec<double> n = nearest(x);
  return power_of_two_at(n, x - n);
}
SSMKIT_INLINE Vec<double> exp(Vec<double> x) {
  x = max(Vec<double>(-709.08), min(Vec<double>(709.79), x));
  const Vec<double> n = nearest(x * Vec<double>(kLog2e<double>));
  Vec<double> r = fnma(n, 0x1.62e42fefa0000p-1, x);  // ln 2 to 37 bits
  r = fnma(n, 0x1.cf79abc9e3b3ap-40, r);
  return power_of_two_at(n, r * Vec<double>(kLog2e<double>));
}

// ---- logistic functions ---------------------------------------------------------------------------------------------

// a / b for 1 <= b <= 3, to 1e-7: an estimate of 1 / b to 14 bits and a Newton step where the division is slow.
SSMKIT_INLINE Vec<float> divide(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  const Vec<float> r = _mm512_maskz_rcp14_ps(0xffff, b.v), q = a * r;
  return fma(fnma(q, b, a), r, q);
#else
  return a / b;
#endif
}
SSMKIT_INLINE Vec<double> divide(Vec<double> a, Vec<double> b) { return a / b; }

// log(1 + u) for 0 <= u <= 1 as 2 artanh(s), s = u / (2 + u) <= 1/3.
SSMKIT_INLINE Vec<float> log1p_unit(Vec<float> u) {
  const Vec<float> s = divide(u, u + Vec<float>(2.0f)), q = s * s;
  // minimax of the relative error, 4.5e-9
  Vec<float> p = fma(q, 0.28011987f, 0.28001805f);
  p = fma(q, p, 0.40021527f);
  p = fma(q, p, 0.66666416f);
  return s * fma(q, p, 2.0f);
}
SSMKIT_INLINE Vec<double> log1p_unit(Vec<double> u) {
  const Vec<double> s = u / (u + Vec<double>(2.0)), q = s * s;
  Vec<double> p(2.0 / 35);
  for (int k = 33; k >= 1; k -= 2) p = fma(q, p, 2.0 / k);
  return s * p;
}

// log(1 + e^x), and x itself above 20.
template <typename T>
SSMKIT_INLINE Vec<T> softplus(Vec<T> x) {
  const Vec<T> zero(T(0));
  const Vec<T> smooth = max(zero, x) + log1p_unit(exp(-abs(x)));
  return select_greater(x, Vec<T>(T(20)), x, smooth);
}

// s = 1 / (1 + e^-x) and its complement 1 - s, both without cancellation.
template <typename T>
struct Logistic {
  Vec<T> s, rest;
};
template <typename T>
SSMKIT_INLINE Logistic<T> logistic(Vec<T> x) {
  const Vec<T> zero(T(0)), one(T(1));
  const Vec<T> e = exp(-abs(x)), large = divide(one, one + e), small = e * large;
  return {select_greater(x, zero, large, small), select_greater(x, zero, small, large)};
}
template <typename T> SSMKIT_INLINE Vec<T> sigmoid(Vec<T> x) { return logistic(x).s; }
template <typename T> SSMKIT_INLINE Vec<T> silu(Vec<T> x) { return x * logistic(x).s; }

// d softplus / dx, 1 above 20 as softplus is the identity there.
template <typename T>
SSMKIT_INLINE Vec<T> softplus_slope(Vec<T> x) {
  return select_greater(x, Vec<T>(T(20)), Vec<T>(T(1)), sigmoid(x));
}
// d silu / dx = s (1 + x (1 - s))
template <typename T>
SSMKIT_INLINE Vec<T> silu_slope(Vec<T> x) {
  const Logistic<T> l = logistic(x);
  return l.s * fma(x, l.rest, Vec<T>(T(1)));
}

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
