// Features in lanes. Memory gives its best to one stream, so a single row of x takes one row of the weight after the
// other, which the processor fetches ahead by itself; several rows of x share each vector of the weight that has arrived.
// Every dot product is summed in one fixed order, whatever stands beside it and however many threads share the rows.
#include "cpu/linear_step.h"

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Sums of a dot product that run side by side: two hide the latency of fma at the speed of memory, and leave registers
// for several rows.
constexpr int kSums = 2;
// Rows of x, and of the weight where x has several, that are multiplied together: fastest of 1, 2 and 4 by 2 and 4 for 4
// and 8 rows of x on an AMD EPYC (family 25, model 17). A single row of x is fastest by one row of the weight after the
// other: two or four at a time, whose addresses lie apart, take 1.5 times as long there.
constexpr int kInputRows = kVectorBytes == 64 ? 4 : 2;
constexpr int kWeightRows = kVectorBytes == 64 ? 4 : 2;
// About what starting a thread costs, in bytes read: an estimate.
constexpr std::int64_t kBytesPerThread = 1 << 18;
// Rows of x that one walk over the weight serves; with it they stay in the caches.
constexpr std::int64_t kRowsPerWalk = 8;
// Rows of the weight that are never parted between threads: whole cache lines of y.
constexpr std::int64_t kRowsPerUnit = 64;

template <typename In>
struct Walk {
  using T = acc_t<In>;
  static constexpr int V = Vec<T>::size;
  const T* x;  // (count, in_features)
  std::int64_t x_stride, count, in_features;
  std::int64_t weight_stride;
  T* partial;  // (count, V, V)  of V rows of the weight, sums still to be added up over lanes
};

// partial[m][r] = weight[r] * x[m], summed over vectors, for M rows of x and R of the weight.
template <int R, int M, typename In>
void products(const Walk<In>& walk, const In* weight, std::int64_t m0, std::int64_t r0) {
  using T = acc_t<In>;
  constexpr int V = Vec<T>::size;
  const T* x = walk.x + m0 * walk.x_stride;
  Vec<T> sums[kSums][R][M];
#pragma GCC unroll 64
  for (int i = 0; i < kSums * R * M; ++i) sums[i / (R * M)][i / M % R][i % M] = Vec<T>(T(0));

  const auto add = [&](Vec<T>(&sum)[R][M], std::int64_t k, const auto& get) __attribute__((always_inline)) {
    Vec<T> w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[r] = get(weight + r * walk.weight_stride + k);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<T> v = get(x + m * walk.x_stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][m] = fma(w[r], v, sum[r][m]);
    }
  };
  std::int64_t k = 0;
  for (; k + kSums * V <= walk.in_features; k += kSums * V) {
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) {
      add(sums[s], k + s * V, [](const auto* from) { return load(from); });
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < kSums; ++s, k += V) {
    const std::int64_t left = walk.in_features - k;
    if (left <= 0) break;
    const int count = static_cast<int>(left < V ? left : V);
    add(sums[s], k, [&](const auto* from) { return count == V ? load(from) : load(from, count); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store(walk.partial + ((m0 + m) * V + r0 + r) * V, sums[0][r][m] + sums[1][r][m]);
}

// The same for every row of x.
template <int R, typename In>
void all_products(const Walk<In>& walk, const In* weight, std::int64_t r0) {
  std::int64_t m = 0;
  for (; m + kInputRows <= walk.count; m += kInputRows) products<R, kInputRows>(walk, weight, m, r0);
  for (; m < walk.count; ++m) products<R, 1>(walk, weight, m, r0);
}

// y[b + m][o] for all rows m of the walk and o from `first` to `last`.
template <typename In>
void walk_rows(const LinearStepParams& p, const Walk<In>& walk, std::int64_t b, std::int64_t first, std::int64_t last) {
  using T = acc_t<In>;
  constexpr int V = Vec<T>::size;
  for (std::int64_t o = first; o < last; o += V) {
    const int count = static_cast<int>(last - o < V ? last - o : V);
    const In* weight = static_cast<const In*>(p.weight) + o * p.weight_stride;
    int r = 0;
    if (walk.count > 1)
      for (; r + kWeightRows <= count; r += kWeightRows) all_products<kWeightRows>(walk, weight + r * p.weight_stride, r);
    for (; r < count; ++r) all_products<1>(walk, weight + r * p.weight_stride, r);

    const auto get = [&](const auto* from) { return count == V ? load(from) : load(from, count); };
    const Vec<T> bias = p.bias ? get(static_cast<const In*>(p.bias) + o) : Vec<T>(T(0));
    for (std::int64_t m = 0; m < walk.count; ++m) {
      const Vec<T> total = sum_rows<T>(walk.partial + m * V * V, V) + bias;
      In* y = static_cast<In*>(p.y) + (b + m) * p.out_features + o;
      count == V ? store(y, total) : store(y, total, count);
    }
  }
}

template <typename In>
void linear(const LinearStepParams& p) {
  using T = acc_t<In>;
  constexpr int V = Vec<T>::size;
  constexpr bool kWiden = !std::is_same_v<In, T>;
  const std::int64_t units = (p.out_features + kRowsPerUnit - 1) / kRowsPerUnit;
  const std::int64_t bytes = p.out_features * p.in_features * static_cast<std::int64_t>(sizeof(In));
  const std::int64_t useful = bytes / kBytesPerThread + 1, most = p.batch < kRowsPerWalk ? p.batch : kRowsPerWalk;
  const int threads = static_cast<int>(useful < p.threads ? useful : p.threads);

  parallel_for(units, threads, [&](std::int64_t begin, std::int64_t end, int) {
    Scratch<T> wide(kWiden ? most * p.in_features : 0), partial(most * V * V);
    // Rows of the last vector that are not there are summed and not stored.
    for (std::int64_t i = 0; i < most * V * V; ++i) partial[i] = T(0);
    const std::int64_t first = begin * kRowsPerUnit;
    const std::int64_t last = end * kRowsPerUnit < p.out_features ? end * kRowsPerUnit : p.out_features;
    for (std::int64_t b = 0; b < p.batch; b += kRowsPerWalk) {
      const In* x = static_cast<const In*>(p.x) + b * p.x_stride;
      Walk<In> walk;
      walk.count = p.batch - b < kRowsPerWalk ? p.batch - b : kRowsPerWalk;
      walk.in_features = p.in_features, walk.weight_stride = p.weight_stride, walk.partial = partial;
      if constexpr (kWiden) {
        for (std::int64_t m = 0; m < walk.count; ++m)
          for (std::int64_t k = 0; k < p.in_features; ++k) wide[m * p.in_features + k] = to_float(x[m * p.x_stride + k]);
        walk.x = wide, walk.x_stride = p.in_features;
      } else {
        walk.x = x, walk.x_stride = p.x_stride;
      }
      walk_rows(p, walk, b, first, last);
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
