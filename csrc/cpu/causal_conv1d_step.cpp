// Channels in lanes: a vector of channels takes all new tokens, then its part of the state moves on. Threads share
// rows x vectors.
#include "cpu/causal_conv1d_step.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Below this many channels to a thread, starting it costs more than it saves.
constexpr std::int64_t kChannelsPerThread = 16384;

// out[j][lane] = weight[lane][j] for `count` lanes, 0 in the others.
template <typename T, typename W>
void taps_of(T* out, const W* weight, std::int64_t width, int count) {
  constexpr int V = Vec<T>::size;
  for (std::int64_t j = 0; j < width; ++j)
    for (int lane = 0; lane < V; ++lane) out[j * V + lane] = lane < count ? static_cast<T>(to_float(weight[lane * width + j])) : T(0);
}

// f(pointer to the first of `from`, as its true type)
template <typename F>
void typed(DType dtype, const void* from, std::int64_t offset, const F& f) {
  switch (dtype) {
    case DType::float64: return f(static_cast<const double*>(from) + offset);
    case DType::bfloat16: return f(static_cast<const bfloat16*>(from) + offset);
    case DType::float16: return f(static_cast<const float16*>(from) + offset);
    default: return f(static_cast<const float*>(from) + offset);
  }
}

template <typename In, typename State>
void step(const CausalConv1dStepParams& p) {
  using T = acc_t<In>;
  using V = Vec<T>;
  constexpr int kLanes = V::size;
  const std::int64_t blocks = (p.dim + kLanes - 1) / kLanes, useful = p.batch * p.dim * p.seqlen / kChannelsPerThread + 1;
  const int threads = static_cast<int>(useful < p.threads ? useful : p.threads);

  parallel_for(p.batch * blocks, threads, [&](std::int64_t begin, std::int64_t end, int) {
    Scratch<T> taps((p.width + 1) * kLanes);
    T* bias = taps + p.width * kLanes;
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t b = unit / blocks, c = unit % blocks * kLanes;
      const int count = static_cast<int>(p.dim - c < kLanes ? p.dim - c : kLanes);
      const auto get = [&](const auto* from) { return count == kLanes ? load(from) : load(from, count); };
      const auto put = [&](auto* to, V v) { count == kLanes ? store(to, v) : store(to, v, count); };
      const In* x = static_cast<const In*>(p.x) + b * p.x_batch_stride + c;
      In* y = static_cast<In*>(p.y) + b * p.seqlen * p.dim + c;
      const std::int64_t slot = p.slots ? p.slots[b] : b;
      if (slot < 0) {
        for (std::int64_t t = 0; t < p.seqlen; ++t) put(y + t * p.dim, V(T(0)));
        continue;
      }
      State* state = static_cast<State*>(p.state) + slot * p.state_len * p.dim + c;
      // entry of the i-th oldest input, i from 0
      const std::int64_t start = p.seen ? p.seen[b] % p.state_len : 0;
      const auto entry = [&](std::int64_t i) {
        return state + (p.seen ? (start + i) % p.state_len : i) * p.dim;
      };
      typed(p.weight_dtype, p.weight, c * p.width, [&](const auto* w) { taps_of<T>(taps, w, p.width, count); });
      if (p.bias) typed(p.bias_dtype, p.bias, c, [&](const auto* w) { taps_of<T>(bias, w, 1, count); });

      for (std::int64_t t = 0; t < p.seqlen; ++t) {
        V sum = p.bias ? load(bias) : V(T(0));
        for (std::int64_t j = 0; j < p.width; ++j) {
          const std::int64_t token = t + j + 1 - p.width;
          const V input = token >= 0 ? get(x + token * p.x_stride) : get(entry(p.state_len + token));
          sum = fma(load(taps + j * kLanes), input, sum);
        }
        put(y + t * p.dim, p.silu ? silu(sum) : sum);
      }

      if (p.seen) {
        for (std::int64_t t = p.seqlen > p.state_len ? p.seqlen - p.state_len : 0; t < p.seqlen; ++t)
          put(entry(t), get(x + t * p.x_stride));
      } else {
        for (std::int64_t i = 0; i < p.state_len; ++i) {
          const std::int64_t from = i + p.seqlen, token = from - p.state_len;
          put(entry(i), token >= 0 ? get(x + token * p.x_stride) : get(entry(from)));
        }
      }
    }
  });
}

template <typename In>
void with_state(const CausalConv1dStepParams& p) {
  switch (p.state_dtype) {
    case DType::bfloat16: return step<In, bfloat16>(p);
    case DType::float16: return step<In, float16>(p);
    default: return step<In, float>(p);
  }
}

}  // namespace

void causal_conv1d_step(const CausalConv1dStepParams& p) {
  switch (p.dtype) {
    case DType::float64: return step<double, double>(p);
    case DType::bfloat16: return with_state<bfloat16>(p);
    case DType::float16: return with_state<float16>(p);
    default: return with_state<float>(p);
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
