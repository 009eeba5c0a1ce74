// Features in lanes: a few rows of the weight pass through the registers once for every group of rows of x. Each dot
// product is summed in one fixed order, whatever stands beside it and however many threads share the rows.
#include "cpu/linear_step.h"

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

#ifndef R_
#define R_ 1
#define U_ 4
#define A_ 4096
#define M_ 4
#endif
constexpr int kSums = U_;
constexpr int kWeightRows = R_;
constexpr int kInputRows = M_;
constexpr int kBytesAhead = A_;
constexpr std::int64_t kBytesPerThread = 1 << 18;
// Rows of x that one walk over the weight serves: their copies in the type of the sums stay in the caches.
constexpr std::int64_t kRowsPerWalk = 8;
// Threads part where a cache line of y does.
constexpr std::int64_t kRowsPerUnit = 32;

SSMKIT_INLINE void prefetch(const void* from) { __builtin_prefetch(static_cast<const char*>(from) + kBytesAhead); }

// sums[r][m] += weight[r] . x[m] over one vector of features
template <int R, int M, typename In, typename T, typename Load>
SSMKIT_INLINE void add(Vec<T> (&sums)[R][M], const Vec<T> (&w)[R], const T* x, std::int64_t stride, const Load& get) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const Vec<T> v = get(x + m * stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r][m] = fma(w[r], v, sums[r][m]);
  }
}

// y[m][r] = weight[r] . x[m] + bias[r]
template <int R, int M, typename In, typename T>
void products(const LinearStepParams& p, const T* x, std::int64_t x_stride, std::int64_t b, std::int64_t row) {
  constexpr int V = Vec<T>::size;
  const In* weight = static_cast<const In*>(p.weight) + row * p.weight_stride;
  Vec<T> sums[kSums][R][M], w[R];
  for (auto& part : sums)
    for (auto& line : part)
      for (auto& sum : line) sum = Vec<T>(T(0));
  const auto whole = [](const auto* from) { return load(from); };

  std::int64_t k = 0;
  for (; k + kSums * V <= p.in_features; k += kSums * V) {
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const In* from = weight + r * p.weight_stride + k + s * V;
        if (s * V * sizeof(In) % 64 == 0) prefetch(from);
        w[r] = load(from);
      }
      add<R, M, In>(sums[s], w, x + k + s * V, x_stride, whole);
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < kSums; ++s) {
    const std::int64_t left = p.in_features - k;
    if (left <= 0) break;
    const int count = static_cast<int>(left < V ? left : V);
    const auto get = [&](const auto* from) { return count == V ? load(from) : load(from, count); };
    for (int r = 0; r < R; ++r) w[r] = get(weight + r * p.weight_stride + k);
    add<R, M, In>(sums[s], w, x + k, x_stride, get);
    k += count;
  }

  const In* bias = static_cast<const In*>(p.bias);
  In* y = static_cast<In*>(p.y) + b * p.out_features + row;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      for (int half = kSums / 2; half > 0; half /= 2)
        for (int s = 0; s < half; ++s) sums[s][r][m] += sums[s + half][r][m];
      T total = sum(sums[0][r][m]);
      if (bias) total += to_float(bias[row + r]);
      from_float(y + m * p.out_features + r, total);
    }
}

template <int R, typename In, typename T>
SSMKIT_INLINE void rows(const LinearStepParams& p, const T* x, std::int64_t stride, std::int64_t b, std::int64_t count, std::int64_t row) {
  for (; count >= kInputRows; count -= kInputRows, b += kInputRows, x += kInputRows * stride)
    products<R, kInputRows, In>(p, x, stride, b, row);
  switch (count) {
    case 3: return products<R, 3, In>(p, x, stride, b, row);
    case 2: return products<R, 2, In>(p, x, stride, b, row);
    case 1: return products<R, 1, In>(p, x, stride, b, row);
    default: return;
  }
}

template <typename In>
void linear(const LinearStepParams& p) {
  using T = acc_t<In>;
  const std::int64_t units = (p.out_features + kRowsPerUnit - 1) / kRowsPerUnit;
  const std::int64_t useful = p.out_features * p.in_features * static_cast<std::int64_t>(sizeof(In)) / kBytesPerThread + 1;
  const int threads = static_cast<int>(useful < p.threads ? useful : p.threads);
  parallel_for(units, threads, [&](std::int64_t begin, std::int64_t end, int) {
    constexpr bool kCopy = !std::is_same_v<In, T>;
    Scratch<T> copy(kCopy ? (p.batch < kRowsPerWalk ? p.batch : kRowsPerWalk) * p.in_features : 0);
    const std::int64_t last = end * kRowsPerUnit < p.out_features ? end * kRowsPerUnit : p.out_features;
    for (std::int64_t b = 0; b < p.batch; b += kRowsPerWalk) {
      const std::int64_t count = p.batch - b < kRowsPerWalk ? p.batch - b : kRowsPerWalk;
      const In* given = static_cast<const In*>(p.x) + b * p.x_stride;
      const T* x;
      if constexpr (kCopy) {
        for (std::int64_t m = 0; m < count; ++m)
          for (std::int64_t k = 0; k < p.in_features; ++k) copy[m * p.in_features + k] = to_float(given[m * p.x_stride + k]);
        x = copy;
      } else {
        x = given;
      }
      const std::int64_t stride = kCopy ? p.in_features : p.x_stride;
      std::int64_t row = begin * kRowsPerUnit;
      for (; row + kWeightRows <= last; row += kWeightRows) rows<kWeightRows, In>(p, x, stride, b, count, row);
      for (; row < last; ++row) rows<1, In>(p, x, stride, b, count, row);
    }
  });
}

}  // namespace

void linear_step(const LinearStepParams& p) {
  switch (p.dtype) {
    case DType::float64: return linear<double>(p);
    case DType::bfloat16: return linear<bfloat16>(p);
    case DType::float16: return linear<float16>(p);
    default: return linear<float>(p);
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
