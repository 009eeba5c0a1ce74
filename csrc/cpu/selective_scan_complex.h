// Complex states: one channel at a time, no SIMD beyond what the compiler finds. y = 2 Re(C.h) + D x.
// Gradients of complex numbers are dL/dRe + i dL/dIm, as in PyTorch.
#pragma once

#include "cpu/selective_scan_sums.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

template <typename T>
struct Complex {
  T re, im;
};
template <typename T> SSMKIT_INLINE Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <typename T> SSMKIT_INLINE Complex<T> operator*(T a, Complex<T> b) { return {a * b.re, a * b.im}; }
template <typename T> SSMKIT_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <typename T> SSMKIT_INLINE Complex<T> conj(Complex<T> a) { return {a.re, -a.im}; }
// Re(a b)
template <typename T> SSMKIT_INLINE T real_of_product(Complex<T> a, Complex<T> b) { return a.re * b.re - a.im * b.im; }

SSMKIT_INLINE Complex<float> exp(Complex<float> a) {
  const float size = ::expf(a.re);
  return {size * ::cosf(a.im), size * ::sinf(a.im)};
}
SSMKIT_INLINE Complex<double> exp(Complex<double> a) {
  const double size = ::exp(a.re);
  return {size * ::cos(a.im), size * ::sin(a.im)};
}

// One sequence of one channel: what both directions read.
template <typename In>
class ComplexChannel {
 public:
  using T = acc_t<In>;
  using C = Complex<T>;

  ComplexChannel(const SelectiveScanParams& p, const Part& part, std::int64_t channel)
      : A(static_cast<const C*>(p.A) + channel * p.dstate),
        D(p.D ? static_cast<const T*>(p.D)[channel] : T(0)),
        p_(p), part_(part), channel_(channel) {}

  const C* B(std::int64_t row) const {
    if (!p_.B_groups) return static_cast<const C*>(p_.B) + channel_ * p_.dstate;
    return static_cast<const C*>(p_.B) + row * p_.B_stride + part_.B_group * p_.dstate;
  }
  const C* C_at(std::int64_t row) const {
    if (!p_.C_groups) return static_cast<const C*>(p_.C) + channel_ * p_.dstate;
    return static_cast<const C*>(p_.C) + row * p_.C_stride + part_.C_group * p_.dstate;
  }
  T x(std::int64_t row) const { return number(p_.x, row * p_.x_stride); }
  T z(std::int64_t row) const { return number(p_.z, row * p_.z_stride); }
  // dt before softplus
  T raw(std::int64_t row) const {
    const T bias = p_.dt_bias ? static_cast<const T*>(p_.dt_bias)[channel_] : T(0);
    return number(p_.dt, row * p_.dt_stride) + bias;
  }
  T dt(T raw) const { return p_.dt_softplus ? softplus(Vec<T>(raw))[0] : raw; }
  T slope(T raw) const { return p_.dt_softplus ? softplus_slope(Vec<T>(raw))[0] : T(1); }

  T number(const void* base, std::int64_t at) const { return to_float(static_cast<const In*>(base)[at + channel_]); }
  void put(void* base, std::int64_t row, T value) const {
    from_float(static_cast<In*>(base) + row * p_.dim + channel_, value);
  }

  const C* const A;
  const T D;

 private:
  const SelectiveScanParams& p_;
  const Part& part_;
  const std::int64_t channel_;
};

constexpr int kComplexChannels = 16;  // per part

// body(part index, channel, sequence) for all channels of all sequences, threads over parts and groups of sequences
template <typename Body>
void each_complex_unit(const SelectiveScanParams& p, const Plan& plan, std::int64_t groups, const Body& body) {
  parallel_for(plan.parts() * groups, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t unit = begin; unit < end; ++unit)
      body(unit % plan.parts(), unit / plan.parts(), sequence_group(p, unit / plan.parts(), groups));
  });
}

template <typename In>
void complex_forward_of(const SelectiveScanForward& p) {
  using T = acc_t<In>;
  using C = Complex<T>;
  const Plan plan(p, kComplexChannels, 1);
  const std::int64_t N = p.dstate, groups = clamp(ceil_div(8 * p.threads, clamp(plan.parts(), 1, 64)), 1, p.nseq);
  const Walk walk = walk_of(p);
  each_complex_unit(p, plan, groups, [&](std::int64_t i, std::int64_t, Range sequences) {
    const Part& part = plan.part(i);
    const Block block = plan.block(part, 0);
    Scratch<C> h(N);
    Chunk chunk;
    for (std::int64_t s = sequences.begin; s < sequences.end; ++s)
      for (std::int64_t d = block.channel; d < block.channel + block.lanes; ++d) {
        const ComplexChannel<In> channel(p, part, d);
        const Sequence sequence = walk.sequence(s);
        for (std::int64_t n = 0; n < N; ++n)
          h[n] = p.initial_state ? static_cast<const C*>(p.initial_state)[(s * p.dim + d) * N + n] : C{0, 0};
        for (std::int64_t k = 0; k < sequence.chunks(); ++k) {
          chunk.fill(walk, sequence, k);
          if (p.checkpoints)
            for (std::int64_t n = 0; n < N; ++n)
              static_cast<C*>(p.checkpoints)[((sequence.slot + k) * N + n) * p.dim + d] = h[n];
          for (int r = 0; r < chunk.nruns; ++r) {
            if (chunk.run[r].restart) fill<C>(h, N, C{0, 0});
            for (int t = chunk.run[r].begin; t < chunk.run[r].end; ++t) {
              const std::int64_t row = chunk.row[t];
              const C *B = channel.B(row), *C_n = channel.C_at(row);
              const T dt = channel.dt(channel.raw(row)), x = channel.x(row);
              T y = T(0);
              for (std::int64_t n = 0; n < N; ++n) {
                h[n] = exp(dt * channel.A[n]) * h[n] + (dt * x) * B[n];
                y += real_of_product(C_n[n], h[n]);
              }
              y = 2 * y + channel.D * x;
              channel.put(p.y, row, p.z ? y * silu(Vec<T>(channel.z(row)))[0] : y);
            }
          }
          for (int t = 0; t < chunk.npads; ++t) channel.put(p.y, chunk.pad[t], T(0));
        }
        for (std::int64_t n = 0; n < N; ++n) static_cast<C*>(p.final_state)[(s * p.dim + d) * N + n] = h[n];
      }
  });
}

// Backward of one channel of one sequence; the sums go to `dA` and so on, dB and dC per token or per state.
template <typename In>
class ComplexAdjoint {
  using T = acc_t<In>;
  using C = Complex<T>;

 public:
  explicit ComplexAdjoint(const SelectiveScanBackward& p)
      : p_(p), walk_(walk_of(p)), N_(p.dstate), g_(N_), of_chunk_(3 * N_), decay_(kChunk * N_), states_((kChunk + 1) * N_) {}

  struct Sums {
    C *dA, *dB, *dC;  // of the channel; per-token dB and dC of the part (rows, dstate)
    T *dD, *bias;
  };

  void run(const ComplexChannel<In>& channel, std::int64_t d, std::int64_t s, const Sums& sums) {
    const Sequence sequence = walk_.sequence(s);
    for (std::int64_t n = 0; n < N_; ++n)
      g_[n] = p_.dfinal_state ? static_cast<const C*>(p_.dfinal_state)[(s * p_.dim + d) * N_ + n] : C{0, 0};
    for (std::int64_t k = sequence.chunks() - 1; k >= 0; --k) {
      chunk_.fill(walk_, sequence, k);
      recompute(channel, (sequence.slot + k) * N_ * p_.dim + d);
      // sums of a chunk first, then of chunks: rounding errors grow with the shorter of the two
      fill<C>(of_chunk_, 3 * N_, C{0, 0});
      T dD = T(0), bias = T(0);
      const Sums of_chunk{of_chunk_, p_.B_groups ? sums.dB : of_chunk_ + N_, p_.C_groups ? sums.dC : of_chunk_ + 2 * N_,
                          &dD, &bias};
      for (int r = chunk_.nruns - 1; r >= 0; --r) {
        for (int t = chunk_.run[r].end - 1; t >= chunk_.run[r].begin; --t)
          token(channel, t, chunk_.run[r].restart && t == chunk_.run[r].begin, of_chunk);
        if (chunk_.run[r].restart) fill<C>(g_, N_, C{0, 0});
      }
      for (std::int64_t n = 0; n < N_; ++n) {
        sums.dA[n] = sums.dA[n] + of_chunk_[n];
        if (!p_.B_groups) sums.dB[n] = sums.dB[n] + of_chunk_[N_ + n];
        if (!p_.C_groups) sums.dC[n] = sums.dC[n] + of_chunk_[2 * N_ + n];
      }
      *sums.dD += dD;
      *sums.bias += bias;
      for (int t = 0; t < chunk_.npads; ++t) {
        channel.put(p_.dx, chunk_.pad[t], T(0));
        channel.put(p_.ddt, chunk_.pad[t], T(0));
        if (p_.z) channel.put(p_.dz, chunk_.pad[t], T(0));
      }
    }
    if (p_.dinitial_state)
      for (std::int64_t n = 0; n < N_; ++n) static_cast<C*>(p_.dinitial_state)[(s * p_.dim + d) * N_ + n] = g_[n];
  }

 private:
  void recompute(const ComplexChannel<In>& channel, std::int64_t checkpoint) {
    for (std::int64_t n = 0; n < N_; ++n)
      states_[n] = static_cast<const C*>(p_.checkpoints)[checkpoint + n * p_.dim];
    for (int r = 0; r < chunk_.nruns; ++r)
      for (int t = chunk_.run[r].begin; t < chunk_.run[r].end; ++t) {
        const bool dropped = chunk_.run[r].restart && t == chunk_.run[r].begin;
        const std::int64_t row = chunk_.row[t];
        const C *B = channel.B(row), *before = states_ + t * N_;
        const T dt = channel.dt(channel.raw(row)), dtx = dt * channel.x(row);
        for (std::int64_t n = 0; n < N_; ++n) {
          const C a = exp(dt * channel.A[n]);
          decay_[t * N_ + n] = a;
          states_[(t + 1) * N_ + n] = (dropped ? C{0, 0} : a * before[n]) + dtx * B[n];
        }
      }
  }

  void token(const ComplexChannel<In>& channel, int t, bool dropped, const Sums& sums) {
    const std::int64_t row = chunk_.row[t];
    const C *B = channel.B(row), *C_n = channel.C_at(row);
    const C *a = decay_ + t * N_, *before = states_ + t * N_, *h = before + N_;
    C* dB = sums.dB + (p_.B_groups ? row * N_ : 0);
    C* dC = sums.dC + (p_.C_groups ? row * N_ : 0);
    const T raw = channel.raw(row), dt = channel.dt(raw), x = channel.x(row);
    const T dy_out = channel.number(p_.dy, row * p_.dy_stride);
    const T dy = p_.z ? dy_out * silu(Vec<T>(channel.z(row)))[0] : dy_out;
    T y = T(0), gB = T(0), qA = T(0);
    for (std::int64_t n = 0; n < N_; ++n) {
      y += real_of_product(C_n[n], h[n]);
      g_[n] = g_[n] + (2 * dy) * conj(C_n[n]);
      dC[n] = dC[n] + (2 * dy) * conj(h[n]);
      dB[n] = dB[n] + (dt * x) * g_[n];
      gB += real_of_product(conj(B[n]), g_[n]);
      g_[n] = conj(a[n]) * g_[n];
      const C q = dropped ? C{0, 0} : conj(before[n]) * g_[n];
      qA += real_of_product(conj(channel.A[n]), q);
      sums.dA[n] = sums.dA[n] + dt * q;
    }
    const T ddt = (x * gB + qA) * channel.slope(raw);
    channel.put(p_.dx, row, dt * gB + channel.D * dy);
    channel.put(p_.ddt, row, ddt);
    if (p_.z) {
      const T slope = silu_slope(Vec<T>(channel.z(row)))[0];
      channel.put(p_.dz, row, dy_out * (2 * y + channel.D * x) * slope);
    }
    *sums.dD += dy * x;
    *sums.bias += ddt;
  }

  const SelectiveScanBackward& p_;
  const Walk walk_;
  const std::int64_t N_;
  Scratch<C> g_, of_chunk_, decay_, states_;
  Chunk chunk_;
};

template <typename In>
void complex_backward_of(const SelectiveScanBackward& p) {
  using T = acc_t<In>;
  using C = Complex<T>;
  const Plan plan(p, kComplexChannels, 1);
  const std::int64_t N = p.dstate, rows = p.batch * p.seqlen, parts = plan.parts();
  const std::int64_t groups = clamp(ceil_div(64, clamp(parts, 1, 64)), 1, clamp(p.nseq, 1, 64));
  const std::int64_t token_sums = parts * rows * N, state_sums = groups * N * p.dim;
  Scratch<C> token_dB(p.B_groups ? token_sums : 0), token_dC(p.C_groups ? token_sums : 0);
  Scratch<T> dA(2 * state_sums), dB(p.B_groups ? 0 : 2 * state_sums), dC(p.C_groups ? 0 : 2 * state_sums);
  Scratch<T> dD(groups * p.dim), bias(groups * p.dim);

  each_complex_unit(p, plan, groups, [&](std::int64_t i, std::int64_t group, Range sequences) {
    const Part& part = plan.part(i);
    const Block block = plan.block(part, 0);
    ComplexAdjoint<In> adjoint(p);
    Scratch<C> of_channel(3 * N);
    // every row belongs to one sequence, so the group's rows are this unit's alone
    const std::int64_t first = sequences.begin < sequences.end ? walk_of(p).sequence(sequences.begin).row : 0;
    std::int64_t last = first;
    if (sequences.begin < sequences.end) {
      const Sequence end = walk_of(p).sequence(sequences.end - 1);
      last = end.row + end.length;
    }
    const std::int64_t at = (i * rows + first) * N, count = (last - first) * N;
    if (p.B_groups) fill(token_dB + at, count, C{0, 0});
    if (p.C_groups) fill(token_dC + at, count, C{0, 0});
    for (std::int64_t d = block.channel; d < block.channel + block.lanes; ++d) {
      const ComplexChannel<In> channel(p, part, d);
      fill<C>(of_channel, 3 * N, C{0, 0});
      T dD_d = T(0), bias_d = T(0);
      const typename ComplexAdjoint<In>::Sums sums{
          of_channel, p.B_groups ? token_dB + i * rows * N : of_channel + N,
          p.C_groups ? token_dC + i * rows * N : of_channel + 2 * N, &dD_d, &bias_d};
      for (std::int64_t s = sequences.begin; s < sequences.end; ++s) adjoint.run(channel, d, s, sums);
      const auto contribute = [&](T* to, const C* from) {
        for (std::int64_t n = 0; n < N; ++n) {
          to[(group * 2 * N + 2 * n) * p.dim + d] = from[n].re;
          to[(group * 2 * N + 2 * n + 1) * p.dim + d] = from[n].im;
        }
      };
      contribute(dA, of_channel);
      if (!p.B_groups) contribute(dB, of_channel + N);
      if (!p.C_groups) contribute(dC, of_channel + 2 * N);
      dD[group * p.dim + d] = dD_d;
      bias[group * p.dim + d] = bias_d;
    }
  });

  const auto reals = [](const C* numbers) { return reinterpret_cast<const T*>(numbers); };
  if (p.B_groups) add_parts<T>(p, plan, reals(token_dB), 2 * N, p.B_groups, &Part::B_group, p.dB, 2 * p.dB_stride);
  else add_contributions<T>(p, dB, groups, 2 * N, p.dB);
  if (p.C_groups) add_parts<T>(p, plan, reals(token_dC), 2 * N, p.C_groups, &Part::C_group, p.dC, 2 * p.dC_stride);
  else add_contributions<T>(p, dC, groups, 2 * N, p.dC);
  add_contributions<T>(p, dA, groups, 2 * N, p.dA);
  if (p.D) add_contributions<T>(p, dD, groups, 1, p.dD);
  if (p.dt_bias) add_contributions<T>(p, bias, groups, 1, p.ddt_bias);
}

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
