// Forward. The state of one block lives in registers, up to kMaxStates of its states at a time, while a chunk of
// tokens goes by; what is done once per token (softplus, D, gate, conversions) goes through buffers of one chunk.
#include "cpu/selective_scan.h"

#include "cpu/selective_scan_complex.h"
#include "cpu/selective_scan_plan.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxStates = 16;
#else
constexpr int kMaxStates = 16;
#endif

// B or C at token t, state n: a number for all lanes, or (constant weights) a vector of them for all tokens.
template <typename T, bool kPerLane>
struct Weight {
  const T* at;
  std::int64_t step;

  SSMKIT_INLINE Vec<T> operator()(int t, int n) const {
    if constexpr (kPerLane) return load(at + n * Vec<T>::size);
    else return Vec<T>(at[t * step + n]);
  }
};

// h <- exp2(A dt) h + dtx B and y += C h for kStates states over the tokens [begin, end) of the buffers. It is dt that
// comes times log2(e): a rounding of A would pull every decay of a state in the same direction.
template <typename T, int kStates, bool kLaneB, bool kLaneC, bool kOutput>
void walk_states(int begin, int end, const T* A, T* state, const T* dt, const T* dtx, Weight<T, kLaneB> B,
                 Weight<T, kLaneC> C, T* y) {
  constexpr int V = Vec<T>::size;
  Vec<T> h[kStates];
#pragma GCC unroll 16
  for (int n = 0; n < kStates; ++n) h[n] = load(state + n * V);
  int t = begin;
  // two tokens per pass share the loads of A and keep more exponentials in flight
  for (; t + 2 <= end; t += 2) {
    const Vec<T> dt0 = load(dt + t * V), dt1 = load(dt + t * V + V);
    const Vec<T> dtx0 = load(dtx + t * V), dtx1 = load(dtx + t * V + V);
    Vec<T> y0, y1;
    if constexpr (kOutput) y0 = load(y + t * V), y1 = load(y + t * V + V);
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) {
      const Vec<T> A_n = load(A + n * V);
      const Vec<T> a0 = exp2(A_n * dt0), a1 = exp2(A_n * dt1);
      h[n] = fma(a0, h[n], dtx0 * B(t, n));
      if constexpr (kOutput) y0 = fma(C(t, n), h[n], y0);
      h[n] = fma(a1, h[n], dtx1 * B(t + 1, n));
      if constexpr (kOutput) y1 = fma(C(t + 1, n), h[n], y1);
    }
    if constexpr (kOutput) store(y + t * V, y0), store(y + t * V + V, y1);
  }
  if (t < end) {
    const Vec<T> dt0 = load(dt + t * V), dtx0 = load(dtx + t * V);
    Vec<T> y0;
    if constexpr (kOutput) y0 = load(y + t * V);
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) {
      h[n] = fma(exp2(load(A + n * V) * dt0), h[n], dtx0 * B(t, n));
      if constexpr (kOutput) y0 = fma(C(t, n), h[n], y0);
    }
    if constexpr (kOutput) store(y + t * V, y0);
  }
#pragma GCC unroll 16
  for (int n = 0; n < kStates; ++n) store(state + n * V, h[n]);
}

// All `dstate` states: as many at a time as registers hold, then halves of that.
template <typename T, int kStates, bool kLaneB, bool kLaneC, bool kOutput>
void walk_all(std::int64_t dstate, int begin, int end, const T* A, T* state, const T* dt, const T* dtx,
              Weight<T, kLaneB> B, Weight<T, kLaneC> C, T* y) {
  constexpr int V = Vec<T>::size;
  std::int64_t n = 0;
  for (; n + kStates <= dstate; n += kStates) {
    const auto B_n = Weight<T, kLaneB>{B.at + n * (kLaneB ? V : 1), B.step};
    const auto C_n = Weight<T, kLaneC>{C.at + n * (kLaneC ? V : 1), C.step};
    walk_states<T, kStates, kLaneB, kLaneC, kOutput>(begin, end, A + n * V, state + n * V, dt, dtx, B_n, C_n, y);
  }
  if constexpr (kStates > 1) {
    if (n == dstate) return;
    const auto B_n = Weight<T, kLaneB>{B.at + n * (kLaneB ? V : 1), B.step};
    const auto C_n = Weight<T, kLaneC>{C.at + n * (kLaneC ? V : 1), C.step};
    walk_all<T, kStates / 2, kLaneB, kLaneC, kOutput>(dstate - n, begin, end, A + n * V, state + n * V, dt, dtx, B_n,
                                                      C_n, y);
  }
}

// One part: its channels' parameters in lanes, and the buffers of one chunk.
template <typename In>
class ForwardPart {
  using T = acc_t<In>;
  static constexpr int V = Vec<T>::size;

 public:
  ForwardPart(const SelectiveScanForward& p, const Plan& plan, const Part& part)
      : p_(p), plan_(plan), part_(part), walk_(walk_of(p)), size_(p.dstate * V),
        step_sizes_(p, plan, part), A_(size_ * part.blocks), B_(p.B_groups ? p.dstate * kChunk : size_ * part.blocks),
        C_(p.C_groups ? p.dstate * kChunk : size_ * part.blocks), vectors_(2 * V * part.blocks),
        tile_(3 * (kChunk + 1) * V) {
    for (int b = 0; b < part.blocks; ++b) {
      const auto [channel, lanes] = plan.block(part, b);
      gather_states(A_ + b * size_, static_cast<const T*>(p.A) + channel * p.dstate, lanes, p.dstate);
      if (!p.B_groups) gather_states(B_ + b * size_, static_cast<const T*>(p.B) + channel * p.dstate, lanes, p.dstate);
      if (!p.C_groups) gather_states(C_ + b * size_, static_cast<const T*>(p.C) + channel * p.dstate, lanes, p.dstate);
      const Vec<T> zero(T(0));
      store(bias(b), p.dt_bias ? load_lanes(static_cast<const T*>(p.dt_bias) + channel, lanes) : zero);
      store(D(b), p.D ? load_lanes(static_cast<const T*>(p.D) + channel, lanes) : zero);
    }
  }

  std::int64_t state_size() const { return size_ * part_.blocks; }

  void initial(std::int64_t s, T* h) const {
    fill(h, state_size(), T(0));
    if (!p_.initial_state) return;
    for (int b = 0; b < part_.blocks; ++b) {
      const auto [channel, lanes] = plan_.block(part_, b);
      const T* from = static_cast<const T*>(p_.initial_state) + (s * p_.dim + channel) * p_.dstate;
      gather_states(h + b * size_, from, lanes, p_.dstate);
    }
  }

  void final(std::int64_t s, const T* h) const {
    for (int b = 0; b < part_.blocks; ++b) {
      const auto [channel, lanes] = plan_.block(part_, b);
      scatter_states(static_cast<T*>(p_.final_state) + (s * p_.dim + channel) * p_.dstate, h + b * size_, lanes,
                     p_.dstate);
    }
  }

  // Chunks [begin, end) of a sequence, from and to the state h, writing y and checkpoints.
  void output(const Sequence& sequence, std::int64_t begin, std::int64_t end, T* h) {
    for (std::int64_t k = begin; k < end; ++k) {
      fill_chunk(sequence, k);
      for (int b = 0; b < part_.blocks; ++b) {
        const auto [channel, lanes] = plan_.block(part_, b);
        if (p_.checkpoints) {
          T* to = static_cast<T*>(p_.checkpoints) + (sequence.slot + k) * p_.dstate * p_.dim + channel;
          for (std::int64_t n = 0; n < p_.dstate; ++n)
            store_lanes(to + n * p_.dim, load(h + b * size_ + n * V), lanes);
        }
        prologue(b, channel, lanes);
        walk<true>(b, h + b * size_);
        epilogue(channel, lanes);
      }
    }
  }

  // The same chunks without output; adds up dt in `dt_sum` and returns whether the state was dropped on the way.
  bool state_only(const Sequence& sequence, std::int64_t begin, std::int64_t end, T* h, T* dt_sum) {
    bool dropped = false;
    fill(dt_sum, V * part_.blocks, T(0));
    for (std::int64_t k = begin; k < end; ++k) {
      fill_chunk(sequence, k);
      for (int r = 0; r < chunk_.nruns; ++r) dropped |= chunk_.run[r].restart;
      for (int b = 0; b < part_.blocks; ++b) {
        const auto [channel, lanes] = plan_.block(part_, b);
        prologue(b, channel, lanes);
        Vec<T> sum = load(dt_sum + b * V);
        for (int t = 0; t < chunk_.count; ++t) sum += load(dt() + t * V);
        store(dt_sum + b * V, sum);
        walk<false>(b, h + b * size_);
      }
    }
    return dropped;
  }

  // h <- decay h + local, the decay over a segment whose dt add up to dt_sum.
  void carry(T* h, const T* local, const T* dt_sum, bool dropped) const {
    for (int b = 0; b < part_.blocks; ++b)
      for (std::int64_t n = 0; n < p_.dstate; ++n) {
        const std::int64_t at = b * size_ + n * V;
        const Vec<T> decay = exp2(load(A_ + at) * load(dt_sum + b * V));
        store(h + at, dropped ? load(local + at) : fma(decay, load(h + at), load(local + at)));
      }
  }

 private:
  T* bias(int b) const { return vectors_ + 2 * V * b; }
  T* D(int b) const { return vectors_ + 2 * V * b + V; }
  T* dt() const { return tile_; }
  T* dtx() const { return tile_ + (kChunk + 1) * V; }
  T* y() const { return tile_ + 2 * (kChunk + 1) * V; }

  void fill_chunk(const Sequence& sequence, std::int64_t k) {
    chunk_.fill(walk_, sequence, k);
    const std::int64_t N = p_.dstate, next = k + 1 < sequence.chunks() ? (k + 1) * kChunk : k * kChunk;
    for (int t = 0; t < chunk_.count; ++t) {
      const std::int64_t row = chunk_.row[t];
      next_row_[t] = next + t < sequence.length ? walk_.row(sequence, next + t) : row;
      if (p_.B_groups) widen(B_ + t * N, static_cast<const In*>(p_.B) + row * p_.B_stride + part_.B_group * N, N);
      if (p_.C_groups) widen(C_ + t * N, static_cast<const In*>(p_.C) + row * p_.C_stride + part_.C_group * N, N);
    }
    step_sizes_.fill_chunk(chunk_);
  }

  // Rows lie too far apart for the hardware to see a pattern, so the lines that the next block will touch (after the
  // last block: the first block of the next chunk) are asked for while this one is worked on.
  void prologue(int b, std::int64_t channel, int lanes) {
    const Vec<T> bias_b = load(bias(b)), D_b = load(D(b)), log2e(kLog2e<T>);
    const In *x = static_cast<const In*>(p_.x), *dt_in = static_cast<const In*>(p_.dt);
    const In *z = static_cast<const In*>(p_.z), *out = static_cast<const In*>(p_.y);
    const bool last = b + 1 == part_.blocks;
    const std::int64_t* next_row = last ? next_row_ : chunk_.row;
    const std::int64_t next_channel = plan_.block(part_, last ? 0 : b + 1).channel;
    for (int t = 0; t < chunk_.count; ++t) {
      const std::int64_t row = chunk_.row[t];
      __builtin_prefetch(x + next_row[t] * p_.x_stride + next_channel, 0, 2);
      if (!p_.dt_rank) __builtin_prefetch(dt_in + next_row[t] * p_.dt_stride + next_channel, 0, 2);
      __builtin_prefetch(out + next_row[t] * p_.y_stride + next_channel, 1, 2);
      if (z) __builtin_prefetch(z + next_row[t] * p_.z_stride + next_channel, 0, 2);
      Vec<T> dt_t = step_sizes_.at(b, t, row, channel, lanes) + bias_b;
      if (p_.dt_softplus) dt_t = softplus(dt_t);
      const Vec<T> x_t = load_lanes(x + row * p_.x_stride + channel, lanes);
      store(dt() + t * V, dt_t * log2e);
      store(dtx() + t * V, dt_t * x_t);
      store(y() + t * V, D_b * x_t);
    }
  }

  void epilogue(std::int64_t channel, int lanes) {
    const Output<In> y_out(p_.y, p_.y_stride, p_.y_sum, p_.dim, channel, lanes);
    const In* z = static_cast<const In*>(p_.z) + channel;
    for (int t = 0; t < chunk_.count; ++t) {
      const std::int64_t row = chunk_.row[t];
      Vec<T> y_t = load(y() + t * V);
      if (p_.z) y_t = y_t * silu(load_lanes(z + row * p_.z_stride, lanes));
      y_out.add(row, y_t);
    }
    for (int i = 0; i < chunk_.npads; ++i) y_out.zero(chunk_.pad[i]);
  }

  template <bool kOutput>
  void walk(int b, T* h) {
    const bool lane_B = !p_.B_groups, lane_C = !p_.C_groups;
    if (lane_B && lane_C) walk<true, true, kOutput>(b, h);
    else if (lane_B) walk<true, false, kOutput>(b, h);
    else if (lane_C) walk<false, true, kOutput>(b, h);
    else walk<false, false, kOutput>(b, h);
  }

  template <bool kLaneB, bool kLaneC, bool kOutput>
  void walk(int b, T* h) {
    const Weight<T, kLaneB> B{B_ + (kLaneB ? b * size_ : 0), p_.dstate};
    const Weight<T, kLaneC> C{C_ + (kLaneC ? b * size_ : 0), p_.dstate};
    for (int r = 0; r < chunk_.nruns; ++r) {
      const auto [begin, end, restart] = chunk_.run[r];
      if (restart) fill(h, size_, T(0));
      walk_all<T, kMaxStates, kLaneB, kLaneC, kOutput>(p_.dstate, begin, end, A_ + b * size_, h, dt(), dtx(), B, C,
                                                       y());
    }
  }

  const SelectiveScanForward& p_;
  const Plan& plan_;
  const Part& part_;
  Walk walk_;
  std::int64_t size_;                // of one block's states
  StepSizes<In> step_sizes_;
  Scratch<T> A_, B_, C_, vectors_;   // A; B, C of the chunk [token][state], or constant [block][state][lane]
  Scratch<T> tile_;                  // dt log2(e), dt x, y: [token][lane]
  Chunk chunk_;
  std::int64_t next_row_[kChunk];    // of the next chunk, where to look ahead
};

// Every sequence walked from end to end by one thread.
template <typename In>
void forward_whole(const SelectiveScanForward& p, const Plan& plan) {
  const std::int64_t groups = clamp(ceil_div(8 * p.threads, plan.parts()), 1, p.nseq);
  parallel_for(plan.parts() * groups, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      ForwardPart<In> part(p, plan, plan.part(unit % plan.parts()));
      Scratch<acc_t<In>> h(part.state_size());
      const Range sequences = sequence_group(p, unit / plan.parts(), groups);
      for (std::int64_t s = sequences.begin; s < sequences.end; ++s) {
        const Sequence sequence = walk_of(p).sequence(s);
        part.initial(s, h);
        part.output(sequence, 0, sequence.chunks(), h);
        part.final(s, h);
      }
    }
  });
}

// Every sequence cut into segments: their states from zero, carried on from one to the next, then the output.
template <typename In>
void forward_segmented(const SelectiveScanForward& p, const Plan& plan, int nsegments) {
  using T = acc_t<In>;
  const std::int64_t size = p.dstate * Vec<T>::size, units = plan.parts() * p.nseq * nsegments;
  Scratch<T> local(units * size), dt_sum(units * Vec<T>::size);
  Scratch<bool> dropped(units);
  const auto each = [&](const auto& body) {
    parallel_for(units, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t unit = begin; unit < end; ++unit) {
        const std::int64_t segment = unit % nsegments, s = unit / nsegments % p.nseq;
        ForwardPart<In> part(p, plan, plan.part(unit / nsegments / p.nseq));
        const Sequence sequence = walk_of(p).sequence(s);
        const std::int64_t chunks = sequence.chunks();
        body(part, unit, segment, s, sequence, chunks * segment / nsegments, chunks * (segment + 1) / nsegments);
      }
    });
  };
  each([&](auto& part, auto unit, auto segment, auto, auto& sequence, auto begin, auto end) {
    if (segment + 1 == nsegments) return;
    fill(local + unit * size, size, T(0));
    dropped[unit] = part.state_only(sequence, begin, end, local + unit * size, dt_sum + unit * Vec<T>::size);
  });
  each([&](auto& part, auto unit, auto segment, auto s, auto& sequence, auto begin, auto end) {
    Scratch<T> h(size);
    part.initial(s, h);
    for (std::int64_t u = unit - segment; u < unit; ++u)
      part.carry(h, local + u * size, dt_sum + u * Vec<T>::size, dropped[u]);
    part.output(sequence, begin, end, h);
    if (segment + 1 == nsegments) part.final(s, h);
  });
}

template <typename In>
void forward(const SelectiveScanForward& p) {
  constexpr int V = Vec<acc_t<In>>::size;
  const std::int64_t blocks = Plan::count(p, V) * p.nseq;
  const int nsegments = segments(p, blocks);
  // neighbouring blocks share the rows of B and C; enough parts are left for every thread to have several
  const int per_part = static_cast<int>(clamp(blocks / (4 * p.threads), 1, 4));
  const Plan plan(p, V, nsegments > 1 ? 1 : per_part);
  if (plan.parts() == 0 || p.nseq == 0) return;
  if (nsegments > 1) forward_segmented<In>(p, plan, nsegments);
  else forward_whole<In>(p, plan);
}

}  // namespace

void selective_scan_forward(const SelectiveScanForward& p) {
  const bool complex = p.complex_state;
  switch (p.dtype) {
    case DType::float64: return complex ? complex_forward_of<double>(p) : forward<double>(p);
    case DType::bfloat16: return complex ? complex_forward_of<bfloat16>(p) : forward<bfloat16>(p);
    case DType::float16: return complex ? complex_forward_of<float16>(p) : forward<float16>(p);
    default: return complex ? complex_forward_of<float>(p) : forward<float>(p);
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
