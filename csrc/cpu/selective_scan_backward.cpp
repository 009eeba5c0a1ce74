// Backward. Chunks are visited from the last to the first; within a chunk one or two states at a time are recomputed
// from the checkpoint (decays and states of the chunk kept in L1), then walked backwards with their adjoint g:
//
//     g_l = a_{l+1} g_{l+1} + C_l dy_l              dC_l = sum_d dy_l h_l        dB_l = sum_d dt_l x_l g_l
//     q_l = g_l a_l h_{l-1}                         dA = sum_l dt_l q_l
//     dx_l = dt_l sum_n g_l B_l + D dy_l            ddt_l = x_l sum_n g_l B_l + sum_n q_l A
//
// dB and dC of a part are first added lane by lane over its blocks. A part's sums, and those over sequences, are
// stored apart and added in order at the end: the result depends on sizes, not on which thread came first.
#include "cpu/selective_scan.h"

#include "cpu/selective_scan_adjoint.h"
#include "cpu/selective_scan_complex.h"
#include "cpu/selective_scan_plan.h"
#include "cpu/selective_scan_sums.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

template <typename In>
class BackwardPart {
  using T = acc_t<In>;
  static constexpr int V = Vec<T>::size;
  static constexpr int kStates = 2;  // at a time

 public:
  BackwardPart(const SelectiveScanBackward& p, const Plan& plan, std::int64_t part, const Partial<T>& partial)
      : p_(p), plan_(plan), part_(plan.part(part)), partial_(partial), walk_(walk_of(p)), size_(p.dstate * V),
        rows_(part * p.batch * p.seqlen), per_token_(p.dstate * kPitch * V), step_sizes_(p, plan, part_),
        A_(size_ * part_.blocks), B_(p.B_groups ? p.dstate * kChunk : size_ * part_.blocks),
        C_(p.C_groups ? p.dstate * kChunk : size_ * part_.blocks), row_(p.dstate),
        dA_(size_ * part_.blocks), dB_(p.B_groups ? per_token_ : size_ * part_.blocks),
        dC_(p.C_groups ? per_token_ : size_ * part_.blocks), checkpoint_(size_), vectors_(4 * V * part_.blocks),
        ddt_low_(p.dt_rank * kPitch * V), ddt_weight_(p.dt_rank * V * part_.blocks),
        tile_((9 + 2 * kStates) * kPitch * V) {
    fill<T>(dA_, size_ * part_.blocks, T(0));
    if (!p.B_groups) fill<T>(dB_, size_ * part_.blocks, T(0));
    if (!p.C_groups) fill<T>(dC_, size_ * part_.blocks, T(0));
    fill<T>(ddt_weight_, p.dt_rank * V * part_.blocks, T(0));
    for (int b = 0; b < part_.blocks; ++b) {
      const auto [channel, lanes] = plan.block(part_, b);
      gather_states(A_ + b * size_, static_cast<const T*>(p.A) + channel * p.dstate, lanes, p.dstate);
      if (!p.B_groups) gather_states(B_ + b * size_, static_cast<const T*>(p.B) + channel * p.dstate, lanes, p.dstate);
      if (!p.C_groups) gather_states(C_ + b * size_, static_cast<const T*>(p.C) + channel * p.dstate, lanes, p.dstate);
      const Vec<T> zero(T(0));
      store(vector(b, kBias), p.dt_bias ? load_lanes(static_cast<const T*>(p.dt_bias) + channel, lanes) : zero);
      store(vector(b, kD), p.D ? load_lanes(static_cast<const T*>(p.D) + channel, lanes) : zero);
      store(vector(b, kDBias), zero);
      store(vector(b, kDD), zero);
    }
  }

  std::int64_t state_size() const { return size_ * part_.blocks; }

  // g after the last token of sequence s.
  void initial(std::int64_t s, T* g) const {
    fill(g, state_size(), T(0));
    if (!p_.dfinal_state) return;
    for (int b = 0; b < part_.blocks; ++b) {
      const auto [channel, lanes] = plan_.block(part_, b);
      const T* from = static_cast<const T*>(p_.dfinal_state) + (s * p_.dim + channel) * p_.dstate;
      gather_states(g + b * size_, from, lanes, p_.dstate);
    }
  }

  // g before the first token is the gradient of the initial state.
  void final(std::int64_t s, const T* g) const {
    if (!p_.dinitial_state) return;
    for (int b = 0; b < part_.blocks; ++b) {
      const auto [channel, lanes] = plan_.block(part_, b);
      scatter_states(static_cast<T*>(p_.dinitial_state) + (s * p_.dim + channel) * p_.dstate, g + b * size_, lanes,
                     p_.dstate);
    }
  }

  // Chunks [begin, end) of a sequence, last to first, from g after them to g before them.
  void gradients(const Sequence& sequence, std::int64_t begin, std::int64_t end, T* g) {
    for (std::int64_t k = end - 1; k >= begin; --k) {
      fill_chunk(sequence, k);
      for (int b = 0; b < part_.blocks; ++b) {
        const auto [channel, lanes] = plan_.block(part_, b);
        const T* from = static_cast<const T*>(p_.checkpoints) + (sequence.slot + k) * p_.dstate * p_.dim + channel;
        for (std::int64_t n = 0; n < p_.dstate; ++n)
          store(checkpoint_ + n * V, load_lanes(from + n * p_.dim, lanes));
        prologue(b, channel, lanes);
        if (p_.z) adjoint<true>(b, g + b * size_);
        else adjoint<false>(b, g + b * size_);
        epilogue(b, channel, lanes);
      }
      if (p_.B_groups) sum_lanes(dB_, p_.dstate, partial_.dB);
      if (p_.C_groups) sum_lanes(dC_, p_.dstate, partial_.dC);
      if (p_.dt_rank) sum_lanes(ddt_low_, p_.dt_rank, partial_.dt);
    }
  }

  // The same chunks for g alone; adds up dt in `dt_sum` and returns whether the state was dropped on the way.
  bool adjoint_alone(const Sequence& sequence, std::int64_t begin, std::int64_t end, T* g, T* dt_sum) {
    bool dropped = false;
    fill(dt_sum, V * part_.blocks, T(0));
    for (std::int64_t k = end - 1; k >= begin; --k) {
      fill_chunk(sequence, k);
      for (int r = 0; r < chunk_.nruns; ++r) dropped |= chunk_.run[r].restart;
      for (int b = 0; b < part_.blocks; ++b) {
        const auto [channel, lanes] = plan_.block(part_, b);
        prologue(b, channel, lanes);
        Vec<T> sum = load(dt_sum + b * V);
        for (int t = 0; t < chunk_.count; ++t) sum += load(tile(kDt) + t * V);
        store(dt_sum + b * V, sum);
        const T *A = A_ + b * size_, *C = C_ + (p_.C_groups ? 0 : b * size_);
        if (p_.C_groups) adjoint_only<T, false>(chunk_, tile(kDt), tile(kDy), A, C, g + b * size_, p_.dstate);
        else adjoint_only<T, true>(chunk_, tile(kDt), tile(kDy), A, C, g + b * size_, p_.dstate);
      }
    }
    return dropped;
  }

  void carry(T* g, const T* local, const T* dt_sum, bool dropped) const {
    for (int b = 0; b < part_.blocks; ++b)
      for (std::int64_t n = 0; n < p_.dstate; ++n) {
        const std::int64_t at = b * size_ + n * V;
        const Vec<T> decay = exp2(load(A_ + at) * load(dt_sum + b * V));
        store(g + at, dropped ? load(local + at) : fma(decay, load(g + at), load(local + at)));
      }
  }

  // The sums over tokens, as contribution `c` of their kind.
  void contribute(std::int64_t c) const {
    for (int b = 0; b < part_.blocks; ++b) {
      const auto [channel, lanes] = plan_.block(part_, b);
      const std::int64_t at = c * p_.dstate * p_.dim + channel;
      for (std::int64_t n = 0; n < p_.dstate; ++n) {
        const std::int64_t from = b * size_ + n * V;
        store_lanes(partial_.dA + at + n * p_.dim, load(dA_ + from) * Vec<T>(kLn2<T>), lanes);
        if (!p_.B_groups) store_lanes(partial_.dB + at + n * p_.dim, load(dB_ + from), lanes);
        if (!p_.C_groups) store_lanes(partial_.dC + at + n * p_.dim, load(dC_ + from), lanes);
      }
      for (std::int64_t r = 0; r < p_.dt_rank; ++r)
        store_lanes(partial_.weight + (c * p_.dt_rank + r) * p_.dim + channel,
                    load(ddt_weight_ + (b * p_.dt_rank + r) * V), lanes);
      if (p_.D) store_lanes(partial_.dD + c * p_.dim + channel, load(vector(b, kDD)), lanes);
      if (p_.dt_bias) store_lanes(partial_.bias + c * p_.dim + channel, load(vector(b, kDBias)), lanes);
    }
  }

 private:
  enum Vector { kBias, kD, kDBias, kDD };
  enum Buffer { kDt, kDtx, kDy, kX, kSlope, kDyOut, kGB, kQA, kY, kDecay, kState = kDecay + kStates, kDdt = kSlope };
  T* vector(int b, Vector which) const { return vectors_ + (4 * b + which) * V; }
  T* tile(int which) const { return tile_ + which * kPitch * V; }

  void fill_chunk(const Sequence& sequence, std::int64_t k) {
    chunk_.fill(walk_, sequence, k);
    if (p_.B_groups) transpose(B_, static_cast<const In*>(p_.B) + part_.B_group * p_.dstate, p_.B_stride);
    if (p_.C_groups) transpose(C_, static_cast<const In*>(p_.C) + part_.C_group * p_.dstate, p_.C_stride);
    step_sizes_.fill_chunk(chunk_);
  }

  void transpose(T* to, const In* from, std::int64_t stride) {
    for (int t = 0; t < chunk_.count; ++t) {
      widen<In>(row_, from + chunk_.row[t] * stride, p_.dstate);
      for (std::int64_t n = 0; n < p_.dstate; ++n) to[n * kChunk + t] = row_[n];
    }
  }

  void prologue(int b, std::int64_t channel, int lanes) {
    const Vec<T> bias = load(vector(b, kBias)), D = load(vector(b, kD)), zero(T(0)), one(T(1)), log2e(kLog2e<T>);
    const In* x_in = static_cast<const In*>(p_.x) + channel;
    const In* dy_in = static_cast<const In*>(p_.dy) + channel;
    const In* z_in = static_cast<const In*>(p_.z) + channel;
    for (int t = 0; t < chunk_.count; ++t) {
      const std::int64_t row = chunk_.row[t];
      const Vec<T> raw = step_sizes_.at(b, t, row, channel, lanes) + bias;
      const Vec<T> dt = p_.dt_softplus ? softplus(raw) : raw;
      const Vec<T> x = load_lanes(x_in + row * p_.x_stride, lanes);
      Vec<T> dy = load_lanes(dy_in + row * p_.dy_stride, lanes);
      if (p_.z) {
        store(tile(kDyOut) + t * V, dy);
        store(tile(kY) + t * V, D * x);
        dy = dy * silu(load_lanes(z_in + row * p_.z_stride, lanes));
      }
      store(tile(kDt) + t * V, dt * log2e);
      store(tile(kDtx) + t * V, dt * x);
      store(tile(kDy) + t * V, dy);
      store(tile(kX) + t * V, x);
      store(tile(kSlope) + t * V, p_.dt_softplus ? softplus_slope(raw) : one);
      store(tile(kGB) + t * V, zero);
      store(tile(kQA) + t * V, zero);
    }
  }

  void epilogue(int b, std::int64_t channel, int lanes) {
    const Vec<T> D = load(vector(b, kD)), zero(T(0)), ln2(kLn2<T>);
    const Output<In> dx_out(p_.dx, p_.dim, p_.dx_sum, p_.dim, channel, lanes);
    const Output<In> dz_out(p_.dz, p_.dim, p_.dz_sum, p_.dim, channel, lanes);
    In* ddt_out = static_cast<In*>(p_.ddt) + (p_.dt_rank ? 0 : channel);
    const In* z_in = static_cast<const In*>(p_.z) + channel;
    Vec<T> dD = zero, dbias = zero;
    for (int t = 0; t < chunk_.count; ++t) {
      const std::int64_t row = chunk_.row[t];
      const Vec<T> dt = load(tile(kDt) + t * V), dy = load(tile(kDy) + t * V), x = load(tile(kX) + t * V);
      const Vec<T> gB = load(tile(kGB) + t * V), qA = load(tile(kQA) + t * V);
      const Vec<T> ddt = fma(x, gB, qA) * load(tile(kSlope) + t * V);
      dx_out.add(row, fma(dt * ln2, gB, D * dy));
      if (p_.dt_rank) store(tile(kDdt) + t * V, ddt);
      else store_lanes(ddt_out + row * p_.ddt_stride, ddt, lanes);
      dD = fma(dy, x, dD);
      dbias += ddt;
      if (p_.z) {
        const Vec<T> slope = silu_slope(load_lanes(z_in + row * p_.z_stride, lanes));
        dz_out.add(row, load(tile(kDyOut) + t * V) * load(tile(kY) + t * V) * slope);
      }
    }
    for (int i = 0; i < chunk_.npads; ++i) {
      dx_out.zero(chunk_.pad[i]);
      if (!p_.dt_rank) zero_lanes(ddt_out + chunk_.pad[i] * p_.ddt_stride, lanes);
      if (p_.z) dz_out.zero(chunk_.pad[i]);
    }
    store(vector(b, kDD), load(vector(b, kDD)) + dD);
    store(vector(b, kDBias), load(vector(b, kDBias)) + dbias);
    low_rank(b);
  }

  // The gradients of both factors of dt = low dt_weight^T: that of low is added up over blocks lane by lane, as dB.
  void low_rank(int b) {
    for (std::int64_t r = 0; r < p_.dt_rank; ++r) {
      const Vec<T> weight = load(step_sizes_.weight(b) + r * V);
      T *to_weight = ddt_weight_ + (b * p_.dt_rank + r) * V, *to_low = ddt_low_ + r * kPitch * V;
      Vec<T> dweight = load(to_weight);
      for (int t = 0; t < chunk_.count; ++t) {
        const Vec<T> ddt = load(tile(kDdt) + t * V);
        dweight = fma(ddt, Vec<T>(step_sizes_.low(t)[r]), dweight);
        store(to_low + t * V, b == 0 ? ddt * weight : fma(ddt, weight, load(to_low + t * V)));
      }
      store(to_weight, dweight);
    }
  }

  template <bool kGated>
  void adjoint(int b, T* g) {
    const bool lane_B = !p_.B_groups, lane_C = !p_.C_groups;
    if (lane_B && lane_C) return adjoint<kGated, true, true, true>(b, g);
    if (b == 0) {
      if (lane_B) adjoint<kGated, true, false, true>(b, g);
      else if (lane_C) adjoint<kGated, false, true, true>(b, g);
      else adjoint<kGated, false, false, true>(b, g);
    } else {
      if (lane_B) adjoint<kGated, true, false, false>(b, g);
      else if (lane_C) adjoint<kGated, false, true, false>(b, g);
      else adjoint<kGated, false, false, false>(b, g);
    }
  }

  template <bool kGated, bool kLaneB, bool kLaneC, bool kFirst>
  void adjoint(int b, T* g) {
    const Tile<T> buffers{tile(kDt), tile(kDtx), tile(kDy), tile(kGB), tile(kQA), tile(kY)};
    StateSums<T> s{A_ + b * size_, B_ + (kLaneB ? b * size_ : 0), C_ + (kLaneC ? b * size_ : 0), checkpoint_, g,
                   dA_ + b * size_, dB_ + (kLaneB ? b * size_ : 0), dC_ + (kLaneC ? b * size_ : 0)};
    const auto advance = [&](int n) {
      s.A += n * V, s.checkpoint += n * V, s.g += n * V, s.dA += n * V;
      s.B += n * (kLaneB ? V : kChunk), s.C += n * (kLaneC ? V : kChunk);
      s.dB += n * (kLaneB ? V : kPitch * V), s.dC += n * (kLaneC ? V : kPitch * V);
    };
    std::int64_t n = 0;
    for (; n + kStates <= p_.dstate; n += kStates, advance(kStates))
      adjoint_states<T, kStates, kLaneB, kLaneC, kGated, kFirst>(chunk_, buffers, s, tile(kDecay), tile(kState));
    for (; n < p_.dstate; ++n, advance(1))
      adjoint_states<T, 1, kLaneB, kLaneC, kGated, kFirst>(chunk_, buffers, s, tile(kDecay), tile(kState));
  }

  // [number][token][lane] -> this part's rows of N numbers.
  void sum_lanes(const T* lanes, std::int64_t N, T* parts) const {
    T* rows = parts + rows_ * N;
    for (int t = 0; t < chunk_.count; ++t) {
      T* to = rows + chunk_.row[t] * N;
      std::int64_t n = 0;
      for (; n + V <= N; n += V) store(to + n, sum_rows(lanes + (n * kPitch + t) * V, kPitch * V));
      for (; n < N; ++n) to[n] = sum(load(lanes + (n * kPitch + t) * V));
    }
    for (int i = 0; i < chunk_.npads; ++i) fill(rows + chunk_.pad[i] * N, N, T(0));
  }

  const SelectiveScanBackward& p_;
  const Plan& plan_;
  const Part& part_;
  const Partial<T> partial_;
  Walk walk_;
  std::int64_t size_;       // of one block's states
  std::int64_t rows_;       // where this part's rows begin in the partial sums per token
  std::int64_t per_token_;  // of the lane-wise sums per token
  StepSizes<In> step_sizes_;
  Scratch<T> A_, B_, C_, row_, dA_, dB_, dC_, checkpoint_, vectors_, ddt_low_, ddt_weight_, tile_;
  Chunk chunk_;
};

template <typename In>
void backward(const SelectiveScanBackward& p) {
  using T = acc_t<In>;
  constexpr int V = Vec<T>::size;
  const std::int64_t blocks = Plan::count(p, V) * p.nseq;
  const int nsegments = segments(p, blocks);
  // By sizes alone, for the order of the sums to be that of any number of threads: up to 8 blocks share one sum over
  // lanes, while 16 units are left to be spread.
  const int per_part = static_cast<int>(clamp(blocks / 16, 1, 8));
  const Plan plan(p, V, nsegments > 1 ? 1 : per_part);
  const std::int64_t parts = plan.parts();
  const std::int64_t groups = nsegments > 1 ? p.nseq : clamp(ceil_div(64, parts ? parts : 1), 1, p.nseq ? p.nseq : 1);
  const std::int64_t contributions = groups * nsegments;

  const std::int64_t token_sums = parts * p.batch * p.seqlen * p.dstate;
  const std::int64_t state_sums = contributions * p.dstate * p.dim;
  Scratch<T> dB(p.B_groups ? token_sums : state_sums), dC(p.C_groups ? token_sums : state_sums), dA(state_sums);
  Scratch<T> dD(contributions * p.dim), bias(contributions * p.dim);
  Scratch<T> ddt(parts * p.batch * p.seqlen * p.dt_rank), ddt_weight(contributions * p.dt_rank * p.dim);
  const Partial<T> partial{dB, dC, dA, dD, bias, ddt, ddt_weight};

  const std::int64_t units = parts * contributions, size = p.dstate * V;
  Scratch<T> local(nsegments > 1 ? units * size : 0), dt_sum(nsegments > 1 ? units * V : 0);
  Scratch<bool> dropped(units);
  const auto bounds = [&](const Sequence& sequence, std::int64_t segment) {
    return Range{sequence.chunks() * segment / nsegments, sequence.chunks() * (segment + 1) / nsegments};
  };
  if (nsegments > 1) {
    parallel_for(units, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t unit = begin; unit < end; ++unit) {
        const std::int64_t part = unit / contributions, s = unit % contributions / nsegments;
        const Sequence sequence = walk_of(p).sequence(s);
        const Range chunks = bounds(sequence, unit % nsegments);
        fill(local + unit * size, size, T(0));
        dropped[unit] = BackwardPart<In>(p, plan, part, partial)
                            .adjoint_alone(sequence, chunks.begin, chunks.end, local + unit * size, dt_sum + unit * V);
      }
    });
  }
  parallel_for(units, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t segment = unit % nsegments;
      BackwardPart<In> part(p, plan, unit / contributions, partial);
      Scratch<T> g(part.state_size());
      const std::int64_t group = unit % contributions / nsegments;
      const Range sequences = nsegments > 1 ? Range{group, group + 1} : sequence_group(p, group, groups);
      for (std::int64_t s = sequences.begin; s < sequences.end; ++s) {
        const Sequence sequence = walk_of(p).sequence(s);
        const Range chunks = bounds(sequence, segment);
        part.initial(s, g);
        for (std::int64_t u = unit - segment + nsegments - 1; u > unit; --u)
          part.carry(g, local + u * size, dt_sum + u * V, dropped[u]);
        part.gradients(sequence, chunks.begin, chunks.end, g);
        if (segment == 0) part.final(s, g);
      }
      part.contribute(unit % contributions);
    }
  });

  if (p.B_groups) add_parts<In>(p, plan, dB, p.dstate, p.B_groups, &Part::B_group, p.dB, p.dB_stride);
  else add_contributions<T>(p, dB, contributions, p.dstate, p.dB);
  if (p.C_groups) add_parts<In>(p, plan, dC, p.dstate, p.C_groups, &Part::C_group, p.dC, p.dC_stride);
  else add_contributions<T>(p, dC, contributions, p.dstate, p.dC);
  add_contributions<T>(p, dA, contributions, p.dstate, p.dA);
  if (p.D) add_contributions<T>(p, dD, contributions, 1, p.dD);
  if (p.dt_bias) add_contributions<T>(p, bias, contributions, 1, p.ddt_bias);
  if (!p.dt_rank) return;
  add_parts<In>(p, plan, ddt, p.dt_rank, 1, &Part::dt_group, p.ddt, p.ddt_stride);
  add_contributions<T>(p, ddt_weight, contributions, p.dt_rank, p.ddt_weight);
}

}  // namespace

void selective_scan_backward(const SelectiveScanBackward& p) {
  const bool complex = p.complex_state;
  switch (p.dtype) {
    case DType::float64: return complex ? complex_backward_of<double>(p) : backward<double>(p);
    case DType::bfloat16: return complex ? complex_backward_of<bfloat16>(p) : backward<bfloat16>(p);
    case DType::float16: return complex ? complex_backward_of<float16>(p) : backward<float16>(p);
    default: return complex ? complex_backward_of<float>(p) : backward<float>(p);
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
