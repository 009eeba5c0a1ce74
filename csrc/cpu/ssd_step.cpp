// The state is read and written once and nothing else is large. States in lanes; four channels at a time, so that B and C
// are loaded once for all of them. Threads share rows x heads x vectors of channels.
#include "cpu/ssd_step.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Below this many states to a thread, starting it costs more than it saves.
constexpr std::int64_t kStatesPerThread = 16384;

// What all channels of a head share.
template <typename In>
struct Head {
  using T = acc_t<In>;
  using V = Vec<T>;
  static constexpr int lanes = V::size;

  explicit Head(const SsdStepParams& p)
      : p(p), B(whole_vectors<T>(static_cast<int>(p.dstate)) + lanes),
        C(whole_vectors<T>(static_cast<int>(p.dstate)) + lanes) {}

  void load_from(std::int64_t b, std::int64_t head) {
    const std::int64_t group = head / (p.nheads / p.ngroups);
    if (b != row_ || group != group_) {
      widen_row(static_cast<T*>(B), static_cast<const In*>(p.B) + b * p.B_stride + group * p.dstate, p.dstate);
      widen_row(static_cast<T*>(C), static_cast<const In*>(p.C) + b * p.C_stride + group * p.dstate, p.dstate);
    }
    if (b == row_ && head == head_) return;
    row_ = b, group_ = group, head_ = head;
    V step = load(static_cast<const In*>(p.dt) + b * p.dt_stride + head, 1);
    if (p.dt_bias) step += load(static_cast<const T*>(p.dt_bias) + head, 1);
    if (p.softplus) step = softplus(step);
    // in this order a NaN stays one
    step = min(V(static_cast<T>(p.dt_max)), max(V(static_cast<T>(p.dt_min)), step));
    dt = step[0];
    decay = exp2(step * V(static_cast<const T*>(p.A)[head] * kLog2e<T>))[0];
  }

  const SsdStepParams& p;
  Scratch<T> B, C;  // (dstate,) and zeros to the end of the last vector
  T dt = 0, decay = 0;

 private:
  std::int64_t row_ = -1, group_ = -1, head_ = -1;
};

// R channels: h = decay h + input B, and the terms of h C that end up in each lane. h (R, dstate), terms (R, lanes).
template <int R, typename In, typename State, typename T>
SSMKIT_INLINE void advance(const Head<In>& head, State* h, const T* input, T* terms) {
  using V = Vec<T>;
  const std::int64_t dstate = head.p.dstate;
  const V decay(head.decay);
  V in[R], total[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) in[r] = V(input[r]), total[r] = V(T(0));
  std::int64_t n = 0;
  for (; n + V::size <= dstate; n += V::size) {
    const V b = load(head.B + n), c = load(head.C + n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      State* at = h + r * dstate + n;
      const V next = fma(decay, load(at), in[r] * b);
      store(at, next);
      total[r] = fma(c, next, total[r]);
    }
  }
  if (n < dstate) {
    const int rest = static_cast<int>(dstate - n);
    const V b = load(head.B + n), c = load(head.C + n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      State* at = h + r * dstate + n;
      const V next = fma(decay, load(at, rest), in[r] * b);
      store(at, next, rest);
      total[r] = fma(c, next, total[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) store(terms + r * V::size, total[r]);
}

template <typename In, typename State>
void step(const SsdStepParams& p) {
  using T = acc_t<In>;
  using V = Vec<T>;
  constexpr int lanes = V::size;
  const std::int64_t blocks = (p.headdim + lanes - 1) / lanes;
  const std::int64_t work = p.batch * p.nheads * p.headdim * p.dstate / kStatesPerThread + 1;
  const int threads = static_cast<int>(work < p.threads ? work : p.threads);

  parallel_for(p.batch * p.nheads * blocks, threads, [&](std::int64_t begin, std::int64_t end, int) {
    Head<In> head(p);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t b = unit / blocks / p.nheads, h = unit / blocks % p.nheads, first = unit % blocks * lanes;
      const int width = static_cast<int>(p.headdim - first < lanes ? p.headdim - first : lanes);
      const std::int64_t channel = h * p.headdim + first, slot = p.slots ? p.slots[b] : b;
      In* y = static_cast<In*>(p.y) + b * p.nheads * p.headdim + channel;
      if (slot < 0) {
        store_upto(y, V(T(0)), width);
        continue;
      }
      head.load_from(b, h);
      const V x = load_upto(static_cast<const In*>(p.x) + b * p.x_stride + channel, width);
      State* state = static_cast<State*>(p.state) + (slot * p.nheads * p.headdim + channel) * p.dstate;
      T input[lanes], terms[lanes * lanes];
      store(input, x * V(head.dt));
      int r = 0;
      if constexpr (lanes >= 4)
        for (; r + 4 <= width; r += 4) advance<4>(head, state + r * p.dstate, input + r, terms + r * lanes);
      for (; r < width; ++r) advance<1>(head, state + r * p.dstate, input + r, terms + r * lanes);
      for (; r < lanes; ++r) store(terms + r * lanes, V(T(0)));

      V result = sum_rows(static_cast<const T*>(terms), lanes);
      if (p.D) result = fma(load_upto(static_cast<const T*>(p.D) + channel, width), x, result);
      if (p.z) result = result * silu(load_upto(static_cast<const In*>(p.z) + b * p.z_stride + channel, width));
      store_upto(y, result, width);
    }
  });
}

template <typename In>
void with_state(const SsdStepParams& p) {
  switch (p.state_dtype) {
    case DType::bfloat16: return step<In, bfloat16>(p);
    case DType::float16: return step<In, float16>(p);
    default: return step<In, float>(p);
  }
}

}  // namespace

void ssd_step(const SsdStepParams& p) {
  switch (p.dtype) {
    case DType::float64: return step<double, double>(p);
    case DType::bfloat16: return with_state<bfloat16>(p);
    case DType::float16: return with_state<float16>(p);
    default: return with_state<float>(p);
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
