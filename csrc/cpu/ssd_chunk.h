// What forward and backward of ssd do alike: which tokens a chunk holds, its step sizes, its decays.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/ssd.h"
#include "cpu/tiles.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

enum Flag : std::uint8_t { kRestart = 1, kPad = 2 };

// Positions first .. first + length - 1 of a sequence make a chunk; its rows in the order of the walk.
struct SsdSequence {
  std::int64_t row, length, slot;

  SsdSequence(const SsdParams& p, std::int64_t s) {
    const std::int64_t chunk = p.chunk;
    if (p.cu_seqlens) {
      row = p.cu_seqlens[s], length = p.cu_seqlens[s + 1] - row, slot = row / chunk + s;
    } else {
      row = s * p.seqlen, length = p.seqlen, slot = s * ((length + chunk - 1) / chunk);
    }
  }
  std::int64_t chunks(int chunk) const { return (length + chunk - 1) / chunk; }
};

// Sizes in the type T of sums: `q` tokens, `n` states, `p` channels of a head, each with the step of its padded rows.
template <typename T>
struct SsdSizes {
  int q, n, p, q_step, n_step, p_step;

  explicit SsdSizes(const SsdParams& s)
      : q(s.chunk), n(static_cast<int>(s.dstate)), p(static_cast<int>(s.headdim)),
        q_step(padded<T>(q)), n_step(padded<T>(n)), p_step(padded<T>(p)) {}
};

template <typename S>
struct SsdChunk {
  using T = acc_t<S>;
  using V = Vec<T>;
  static constexpr int lanes = V::size;

  const SsdParams& params;
  const SsdSizes<T> size;
  int heads_step;
  int count = 0;
  bool restarts = false;
  Scratch<std::int64_t> row;
  Scratch<std::uint8_t> pad;
  Scratch<T> part;         // (q,) restarts of the chunk up to and with each token
  Scratch<T> B;            // (q, n)
  Scratch<T> C;            // (q, n)
  Scratch<T> steps, slopes;  // (q, heads): dt as the recurrence uses it, and its derivative by the input
  // of one head
  Scratch<T> dt;           // (q,)
  Scratch<T> high, low;    // (q,) sum of dt A log2(e) up to and with each token, in two parts
  Scratch<T> enter, leave; // (q,) decay from the chunk's start to each token, and from each token to its end
  T across;                // decay of the whole chunk

  SsdChunk(const SsdParams& p, int heads)
      : params(p), size(p), heads_step(padded<T>(heads)), row(size.q), pad(size.q), part(size.q_step),
        B(rows() * size.n_step), C(rows() * size.n_step), steps(std::int64_t{size.q} * heads_step),
        slopes(std::int64_t{size.q} * heads_step), dt(size.q_step), high(size.q_step), low(size.q_step),
        enter(size.q_step), leave(size.q_step) {}

  std::int64_t rows() const { return whole_vectors<T>(size.q); }

  // Tokens, weights of one group and step sizes of the heads [head, head + heads); pads count as zeros with dt = 0.
  void load_tokens(const SsdSequence& sequence, std::int64_t index, int group, std::int64_t head, int heads,
                   bool with_slopes) {
    const std::int64_t first = index * size.q;
    count = static_cast<int>(sequence.length - first < size.q ? sequence.length - first : size.q);
    int parts = 0;
    for (int i = 0; i < count; ++i) {
      const std::int64_t at = first + i;
      row[i] = sequence.row + (params.reverse ? sequence.length - 1 - at : at);
      const std::uint8_t flag = params.flags ? params.flags[row[i]] : 0;
      pad[i] = (flag & kPad) != 0;
      parts += flag & kRestart;
      part[i] = static_cast<T>(parts);
    }
    restarts = parts > 0;
    const int end = whole_vectors<T>(count);
    for (int i = count; i < end; ++i) part[i] = T(-1);
    load_weights(B, params.B, params.B_stride, group);
    load_weights(C, params.C, params.C_stride, group);
    load_steps(head, heads, with_slopes);
  }

  // The decays of one head, the i-th of those whose steps are loaded.
  void load_head(std::int64_t head, int i) {
    const double rate = static_cast<double>(static_cast<const T*>(params.A)[head]) * kLog2e<double>;
    double total = 0;
    for (int t = 0; t < count; ++t) {
      dt[t] = steps[t * heads_step + i];
      total += static_cast<double>(dt[t]) * rate;
      high[t] = static_cast<T>(total);
      low[t] = static_cast<T>(total - static_cast<double>(high[t]));
    }
    const int end = whole_vectors<T>(count);
    for (int t = count; t < end; ++t) dt[t] = T(0), high[t] = high[count - 1], low[t] = low[count - 1];
    const T last = part[count - 1], zero = T(0);
    const V last_high(high[count - 1]), last_low(low[count - 1]);
    for (int t = 0; t < end; t += lanes) {
      const V parts = load(part + t), high_t = load(high + t);
      const V in = exp2(high_t), out = exp2((last_high - high_t) + (last_low - load(low + t)));
      store(enter + t, keep_equal(parts, V(zero), in));
      store(leave + t, keep_equal(parts, V(last), out));
    }
    across = last == zero ? enter[count - 1] : zero;
  }

  // part where the token of the lane stands before `token`, else 0
  SSMKIT_INLINE V before(int token, int lane, V part_sums) const {
    return select_greater(V(static_cast<T>(token - lane)), count_up(), part_sums, V(T(0)));
  }

  // x where a == b, else 0
  static V keep_equal(V a, V b, V x) { return a.v == b.v ? x.v : V(T(0)).v; }

  // Decay from token `from` to the tokens to .. to + lanes - 1, or with kFrom the other way round; 0 where the later one
  // is not later, or a restart lies between. A difference within the chunk, taken part by part: no digits are lost.
  template <bool kFrom>
  SSMKIT_INLINE V decay(int fixed, int lane) const {
    const V forward = (V(high[fixed]) - load(high + lane)) + (V(low[fixed]) - load(low + lane));
    V exponent = kFrom ? forward : -forward;
    if (kFrom ? lane + lanes > fixed + 1 : lane < fixed) {
      // the number of each lane's token, without a table: lanes count up from `lane`
      const V number = count_up() + V(static_cast<T>(lane)), here(static_cast<T>(fixed));
      exponent = select_greater(V(T(0)), kFrom ? here - number : number - here, V(T(-2e4)), exponent);
    }
    V result = exp2(exponent);
    if (restarts) result = keep_equal(load(part + lane), V(part[fixed]), result);
    return result;
  }

 private:
  static SSMKIT_INLINE V count_up() {
    typename V::Reg number;
    for (int i = 0; i < lanes; ++i) number[i] = static_cast<T>(i);
    return number;
  }

  void load_weights(T* out, const void* in, std::int64_t stride, int group) {
    const S* from = static_cast<const S*>(in) + group * params.dstate;
    for (int i = 0; i < count; ++i)
      if (pad[i])
        clear_row(out + i * std::int64_t{size.n_step}, size.n);
      else
        widen_row(out + i * std::int64_t{size.n_step}, from + row[i] * stride, size.n);
  }

  void load_steps(std::int64_t head, int heads, bool with_slopes) {
    const T* bias = static_cast<const T*>(params.dt_bias);
    const V low_limit(static_cast<T>(params.dt_min)), high_limit(static_cast<T>(params.dt_max)), zero(T(0)), one(T(1));
    for (int i = 0; i < count; ++i) {
      const S* in = static_cast<const S*>(params.dt) + row[i] * params.dt_stride + head;
      for (int h = 0; h < heads; h += lanes) {
        T* step = steps + i * heads_step + h;
        T* slope = slopes + i * heads_step + h;
        if (pad[i]) {
          store(step, zero), store(slope, zero);
          continue;
        }
        V raw = load_upto(in + h, heads - h);
        if (bias) raw += load_upto(bias + head + h, heads - h);
        const V free = params.dt_softplus ? softplus(raw) : raw;
        // In this order a NaN stays one.
        store(step, min(high_limit, max(low_limit, free)));
        if (!with_slopes) continue;
        const V inside = select_greater(low_limit, free, zero, select_greater(free, high_limit, zero, one));
        store(slope, params.dt_softplus ? inside * softplus_slope(raw) : inside);
      }
    }
  }
};

// (headdim, dstate) as callers have it, to and from (dstate, p_step).
template <typename T>
void read_state(T* out, const T* in, const SsdSizes<T>& size) {
  for (int n = 0; n < size.n; ++n) {
    T* row = out + n * std::int64_t{size.p_step};
    clear_row(row, size.p);
    if (in)
      for (int c = 0; c < size.p; ++c) row[c] = in[c * std::int64_t{size.n} + n];
  }
}
template <typename T>
void write_state(T* out, const T* in, const SsdSizes<T>& size) {
  for (int c = 0; c < size.p; ++c)
    for (int n = 0; n < size.n; ++n) out[c * std::int64_t{size.n} + n] = in[n * std::int64_t{size.p_step} + c];
}

// state, what a chunk adds, becomes the state before it, and `carried` the one after it.
template <typename T>
void pass_on(T* carried, T* state, T decay, const SsdSizes<T>& size) {
  for (std::int64_t n = 0; n < size.n; ++n)
    for (std::int64_t c = 0; c < size.p; c += Vec<T>::size) {
      const std::int64_t i = n * size.p_step + c;
      const Vec<T> before = load(carried + i), added = load(state + i);
      store(state + i, before);
      store(carried + i, fma(Vec<T>(decay), before, added));
    }
}

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
