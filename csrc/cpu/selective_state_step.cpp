// States in lanes: they lie next to each other, and a channel's sum over them ends its token. What depends on the channel
// alone (dt, the skip, the gate) is done for a vector of channels before and after. Threads share rows x channel blocks.
#include "cpu/selective_state_step.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Below this many states to a thread, starting it costs more than it saves.
constexpr std::int64_t kStatesPerThread = 16384;

template <typename In, typename State>
void step(const SelectiveStateStepParams& p) {
  using T = acc_t<In>;
  using V = Vec<T>;
  constexpr int kLanes = V::size;
  const std::int64_t blocks = (p.dim + kLanes - 1) / kLanes;
  const std::int64_t work = p.batch * p.dim * p.dstate / kStatesPerThread + 1;
  const int threads = static_cast<int>(work < p.threads ? work : p.threads);

  parallel_for(p.batch * blocks, threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t b = unit / blocks, first = unit % blocks * kLanes;
      const int width = static_cast<int>(p.dim - first < kLanes ? p.dim - first : kLanes);
      In* y = static_cast<In*>(p.y) + b * p.dim + first;
      const std::int64_t slot = p.slots ? p.slots[b] : b;
      const auto row = [&](const void* from, std::int64_t stride) {
        return load(static_cast<const In*>(from) + b * stride + first, width);
      };
      const auto parameter = [&](const void* from) { return load(static_cast<const T*>(from) + first, width); };
      if (slot < 0) {
        store(y, V(T(0)), width);
        continue;
      }

      const V x = row(p.x, p.x_stride);
      V dt = row(p.dt, p.dt_stride);
      if (p.dt_bias) dt = dt + parameter(p.dt_bias);
      if (p.softplus) dt = softplus(dt);
      T exponent[kLanes], input[kLanes], output[kLanes] = {};
      store(exponent, dt * V(kLog2e<T>));
      store(input, dt * x);

      for (int lane = 0; lane < width; ++lane) {
        const std::int64_t d = first + lane;
        State* h = static_cast<State*>(p.state) + (slot * p.dim + d) * p.dstate;
        const T* A = static_cast<const T*>(p.A) + d * p.dstate;
        const In* B = static_cast<const In*>(p.B) + b * p.B_stride + d / (p.dim / p.groups_B) * p.dstate;
        const In* C = static_cast<const In*>(p.C) + b * p.C_stride + d / (p.dim / p.groups_C) * p.dstate;
        V total(T(0));
        const auto advance = [&](std::int64_t n, int count) {
          const bool whole = count == kLanes;
          const auto get = [&](auto* from) { return whole ? load(from + n) : load(from + n, count); };
          const V next = fma(exp2(V(exponent[lane]) * get(A)), get(h), V(input[lane]) * get(B));
          if (whole) store(h + n, next);
          else store(h + n, next, count);
          total = fma(get(C), next, total);
        };
        std::int64_t n = 0;
        for (; n + kLanes <= p.dstate; n += kLanes) advance(n, kLanes);
        if (n < p.dstate) advance(n, static_cast<int>(p.dstate - n));
        output[lane] = sum(total);
      }

      V result = load(output);
      if (p.D) result = fma(parameter(p.D), x, result);
      if (p.z) result = result * silu(row(p.z, p.z_stride));
      store(y, result, width);
    }
  });
}

template <typename In>
void with_state(const SelectiveStateStepParams& p) {
  switch (p.state_dtype) {
    case DType::bfloat16: return step<In, bfloat16>(p);
    case DType::float16: return step<In, float16>(p);
    default: return step<In, float>(p);
  }
}

}  // namespace

void selective_state_step(const SelectiveStateStepParams& p) {
  switch (p.dtype) {
    case DType::float64: return step<double, double>(p);
    case DType::bfloat16: return with_state<bfloat16>(p);
    case DType::float16: return with_state<float16>(p);
    default: return with_state<float>(p);
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
