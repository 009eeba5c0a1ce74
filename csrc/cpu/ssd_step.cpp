// The state is read and written once and nothing else is large: it streams through in the order in which it lies, states
// in lanes (several channels side by side load B and C once for all, and take twice as long where the state comes from
// memory). Threads share rows x heads x vectors of channels.
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

// One channel: h = decay h + input B; the terms of h C that end up in each lane.
template <typename In, typename State, typename T>
SSMKIT_INLINE Vec<T> advance(const Head<In>& head, State* h, T input) {
  using V = Vec<T>;
  const std::int64_t dstate = head.p.dstate;
  const V decay(head.decay), in(input);
  V total(T(0));
  std::int64_t n = 0;
  for (; n + V::size <= dstate; n += V::size) {
    const V next = fma(decay, load(h + n), in * load(head.B + n));
    store(h + n, next);
    total = fma(load(head.C + n), next, total);
  }
  if (n < dstate) {
    const int rest = static_cast<int>(dstate - n);
    const V next = fma(decay, load(h + n, rest), in * load(head.B + n));
    store(h + n, next, rest);
    total = fma(load(head.C + n), next, total);
  }
  return total;
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
      for (int r = 0; r < lanes; ++r)
        store(terms + r * lanes, r < width ? advance(head, state + r * p.dstate, input[r]) : V(T(0)));

      V result = sum_rows(static_cast<const T*>(terms), lanes);
      if (p.D) {
        const T* D = static_cast<const T*>(p.D) + h * p.D_stride;
        result = fma(p.D_per_head ? V(*D) : load_upto(D + first, width), x, result);
      }
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
