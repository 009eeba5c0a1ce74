// Backward of ssd for one run of heads, chunk by chunk.
#pragma once

#include <cstdint>

#include "cpu/ssd_chunk.h"
#include "cpu/ssd_plan.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Where a run leaves what is summed over runs: (rows, ngroups, n) for dB and dC, one number or row per head for the rest.
template <typename T>
struct Sums {
  T *dB, *dC;
  bool first;  // of the runs that share dB and dC: writes, the others add
  double *dA, *dD, *ddt_bias;  // (heads,), (heads, p), (heads,), zero to begin with; dD may be null
};

// Chunks of one run of heads, the last first; the mirror image of ForwardRun. In a chunk, with dy after the gate,
//   du_s = exp(cs_end - cs_s) B_s dH + sum_{t >= s} M_ts dy_t         gradient of dt_s x_s, M_ts = (C_t . B_s) L_ts
//   dH  <- exp(cs_end) dH + sum_t exp(cs_t) C_t dy_t^T
// and the logarithm of each token's decay gets a sum of products that pass over it: nothing is subtracted there.
// Operands of the products that are repeated for each head are in units U (pairs.h).
template <typename S, typename U>
class BackwardRun {
 public:
  using T = acc_t<S>;
  using V = Vec<T>;
  static constexpr int lanes = V::size;

  BackwardRun(const SsdBackward& p, int heads)
      : p_(p), chunk_(p, heads), size_(chunk_.size), state_size_(std::int64_t{size_.n} * size_.p_step),
        n_row_(padded<U>(units<U>(size_.n))), p_row_(padded<U>(units<U>(size_.p))),
        Bt_(std::int64_t{size_.n} * size_.q_step), Ct_(std::int64_t{size_.n} * size_.q_step),
        dBt_(std::int64_t{size_.n} * size_.q_step), dCt_(std::int64_t{size_.n} * size_.q_step),
        weights_(chunk_.rows() * size_.n_step), G_(chunk_.rows() * size_.q_step), dG_(chunk_.rows() * size_.q_step),
        M_(chunk_.rows() * size_.q_step), T_(chunk_.rows() * size_.q_step), x_(chunk_.rows() * size_.p_step),
        dy_(chunk_.rows() * size_.p_step), entered_(chunk_.rows() * size_.p_step),
        dots_(std::int64_t{size_.q} * lanes), crossed_(size_.q_step), left_(size_.q_step), entered_by_(size_.q_step),
        dD_(size_.p_step), ddt_(std::int64_t{size_.q} * chunk_.heads_step),
        B_rows_(chunk_.B, size_.q, n_row_), C_columns_(chunk_.C, units<U>(size_.q), size_.n_step),
        x_rows_(x_, size_.q, p_row_), dy_rows_(dy_, size_.q, p_row_), dstate_rows_(nullptr, size_.n, p_row_),
        state_rows_(nullptr, size_.n, p_row_), dy_columns_(dy_, units<U>(size_.q), size_.p_step),
        entered_columns_(entered_, units<U>(size_.q), size_.p_step),
        dstate_columns_(nullptr, units<U>(size_.n), size_.p_step), M_columns_(M_, units<U>(size_.q), size_.q_step),
        xt_(units<U>(size_.p) * std::int64_t{size_.q_step}), dyt_(units<U>(size_.p) * std::int64_t{size_.q_step}) {}

  // dstates: (heads, n, p_step), gradient of the state after chunk end - 1, and on return, unless for outputs alone, of
  // the one before chunk begin. decays: (heads,) the decay over all these chunks.
  void walk(const SsdSequence& sequence, std::int64_t begin, std::int64_t end, int group, std::int64_t head, int heads,
            T* dstates, Work work, T* decays, const Sums<T>& sums) {
    const bool outputs = work != Work::state;
    for (int i = 0; i < heads; ++i) decays[i] = T(1);
    for (std::int64_t index = end; index-- > begin;) {
      chunk_.load_tokens(sequence, index, group, head, heads, outputs);
      if (work != Work::outputs) C_columns_.along_columns(chunk_.C, size_.n_step, chunk_.count, size_.n);
      if (outputs) similarities();
      for (int i = 0; i < heads; ++i) {
        T* dstate = dstates + i * state_size_;
        chunk_.load_head(head + i, i);
        load_rows(head + i, outputs, outputs && sums.dD ? sums.dD + i * size_.p : nullptr);
        if (outputs) {
          const T* state = static_cast<const T*>(p_.checkpoints) +
                           ((sequence.slot + index) * p_.nheads + head + i) * size_.n * size_.p;
          const bool zero = index == 0 && !p_.initial_state;
          products();
          inputs(dstate, head + i);
          through_B(dstate);
          through_C(zero ? nullptr : state);
          steps(head + i, i, zero ? T(0) : chunk_.across * dot(state, dstate), sums);
        }
        if (work != Work::outputs) update(dstate);
        decays[i] = decays[i] * chunk_.across;
      }
      if (outputs) weights(group, head, heads, sums);
    }
  }

 private:
  // G[t][s] = C_t . B_s, shared by the heads of the group; and zeros where the heads add up
  void similarities() {
    const int q = chunk_.count;
    B_rows_.along_rows(chunk_.B, size_.n_step, q, size_.n);
    transpose<T>(Bt_, size_.q_step, chunk_.B, size_.n_step, q, size_.n);
    transpose<T>(Ct_, size_.q_step, chunk_.C, size_.n_step, q, size_.n);
    for (int n = 0; n < size_.n; ++n) {
      clear_row(dBt_ + n * std::int64_t{size_.q_step}, q);
      clear_row(dCt_ + n * std::int64_t{size_.q_step}, q);
    }
    for (int t = 0; t < q; ++t) clear_row(dG_ + t * std::int64_t{size_.q_step}, q);
    for_tiles<T>(q, q, [&](auto shape, int t, int s) {
      if (s >= t + shape.rows) return;
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(size_.n, chunk_.C + t * std::int64_t{size_.n_step}, size_.n_step, Bt_ + s, size_.q_step);
      tile.each([&](int r, int c, V sum) { store(G_ + (t + r) * std::int64_t{size_.q_step} + s + c, sum); });
    });
  }

  // x and dy of one head: as they are, transposed, and dy times its decay from the start of the chunk
  void load_rows(std::int64_t head, bool all, double* dD) {
    const int q = chunk_.count;
    clear_row(static_cast<T*>(dD_), size_.p);
    for (int t = 0; t < q; ++t) {
      const std::int64_t row = chunk_.row[t], at = t * std::int64_t{size_.p_step};
      if (chunk_.pad[t]) {
        clear_row(x_ + at, size_.p), clear_row(dy_ + at, size_.p), clear_row(entered_ + at, size_.p);
        if (all && p_.dz) put_row(p_.dz, row, head);
        continue;
      }
      const S* x = static_cast<const S*>(p_.x) + row * p_.x_stride + head * size_.p;
      const S* dy = static_cast<const S*>(p_.dy) + row * p_.dy_stride + head * size_.p;
      const V enter(chunk_.enter[t]);
      for (int c = 0; c < size_.p; c += lanes) {
        const int left = size_.p - c;
        // the next head's channels, as in forward
        __builtin_prefetch(x + size_.p + c);
        __builtin_prefetch(dy + size_.p + c);
        V grad = load_upto(dy + c, left);
        if (p_.z) {
          const V z = load_upto(static_cast<const S*>(p_.z) + row * p_.z_stride + head * size_.p + c, left);
          if (all && p_.dz) {
            const std::int64_t out = (row * p_.nheads + head) * size_.p + c;
            put(p_.dz, out, grad * load_upto(static_cast<const T*>(p_.ungated) + out, left) * silu_slope(z), left);
          }
          grad = grad * silu(z);
        }
        store(dy_ + at + c, grad);
        store(entered_ + at + c, enter * grad);
        if (!all) continue;
        const V value = load_upto(x + c, left);
        store(x_ + at + c, value);
        if (dD) store(dD_ + c, fma(value, grad, load(dD_ + c)));
      }
    }
    entered_columns_.along_columns(entered_, size_.p_step, q, size_.p);
    if (!all) return;
    for (int c = 0; dD && c < size_.p; ++c) dD[c] += dD_[c];
    x_rows_.along_rows(x_, size_.p_step, q, size_.p);
    dy_rows_.along_rows(dy_, size_.p_step, q, size_.p);
    dy_columns_.along_columns(dy_, size_.p_step, q, size_.p);
    transpose_units<U>(xt_, size_.q_step, x_rows_.data, p_row_, q, units<U>(size_.p));
    transpose_units<U>(dyt_, size_.q_step, dy_rows_.data, p_row_, q, units<U>(size_.p));
  }

  // dM[t][s] = dy_t . x_s, and what follows from it alone
  void products() {
    const int q = chunk_.count;
    const std::int64_t q_step = size_.q_step;
    for_tiles<T>(q, q, [&](auto shape, int t, int s) {
      if (s >= t + shape.rows) return;
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(units<U>(size_.p), dy_rows_.data + t * p_row_, p_row_, xt_ + s, q_step);
      tile.each([&](int r, int c, V dM) {
        const std::int64_t at = (t + r) * q_step + s + c;
        const V L = chunk_.template decay<true>(t + r, s + c), M = L * load(G_ + at);
        const V step_dM = dM * load(chunk_.dt + s + c);
        store(M_ + at, M);
        store(T_ + at, step_dM * M);
        store(dG_ + at, fma(step_dM, L, load(dG_ + at)));
      });
    });
    M_columns_.along_columns(M_, q_step, q, q);
  }

  // dx = dt du + D dy, and the rows' products du . x
  void inputs(const T* dstate, std::int64_t head) {
    const int q = chunk_.count;
    const std::int64_t q_step = size_.q_step, p_step = size_.p_step;
    for (int s = 0; s < q; ++s) store(dots_ + s * lanes, V(T(0)));
    dstate_columns_.along_columns(dstate, p_step, size_.n, size_.p);
    for_tiles<T>(q, size_.p, [&](auto shape, int s, int c) {
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(units<U>(size_.n), B_rows_.data + s * n_row_, n_row_, dstate_columns_.data + c, p_step);
      tile.each([&](int r, int, V& sum) { sum = sum * V(chunk_.leave[s + r]); });
      // s is even: a tile of one row is the last
      const std::int64_t from = s / kTerms<U>;
      tile.add_columns(units<U>(q - s), M_columns_.data + from * q_step + s, q_step,
                       dy_columns_.data + from * p_step + c, p_step);
      tile.each([&](int r, int i, V du) {
        const int left = size_.p - c - i;
        const std::int64_t at = (s + r) * p_step + c + i;
        store(dots_ + (s + r) * lanes, fma(du, load(x_ + at), load(dots_ + (s + r) * lanes)));
        V dx = du * V(chunk_.dt[s + r]);
        if (p_.D) dx = fma(load_upto(static_cast<const T*>(p_.D) + head * size_.p + c + i, left), load(dy_ + at), dx);
        put(p_.dx, (chunk_.row[s + r] * p_.nheads + head) * size_.p + c + i, dx, left);
      });
    });
  }

  // dB from the state after the chunk; left_[s]: what the decay from s to the end gets
  void through_B(const T* dstate) {
    const std::int64_t q_step = size_.q_step;
    clear_row(static_cast<T*>(left_), chunk_.count);
    dstate_rows_.along_rows(dstate, size_.p_step, size_.n, size_.p);
    for_tiles<T>(size_.n, chunk_.count, [&](auto shape, int n, int s) {
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(units<U>(size_.p), dstate_rows_.data + n * p_row_, p_row_, xt_ + s, q_step);
      V sums[shape.vecs];
      for (int i = 0; i < shape.vecs; ++i) sums[i] = V(T(0));
      tile.each([&](int r, int c, V sum) {
        const std::int64_t at = (n + r) * q_step + s + c;
        const V grad = sum * load(chunk_.leave + s + c) * load(chunk_.dt + s + c);
        store(dBt_ + at, grad + load(dBt_ + at));
        sums[c / lanes] = fma(grad, load(Bt_ + at), sums[c / lanes]);
      });
      for (int i = 0; i < shape.vecs; ++i)
        store(left_ + s + i * lanes, sums[i] + load(left_ + s + i * lanes));
    });
  }

  // dC from the state before the chunk, (n, p) dense or null for zeros; entered_by_[t]: what the decay from there to t gets
  void through_C(const T* state) {
    const std::int64_t q_step = size_.q_step;
    clear_row(static_cast<T*>(entered_by_), chunk_.count);
    if (!state) return;
    state_rows_.along_rows(state, size_.p, size_.n, size_.p);
    const std::int64_t row = kTerms<U> == 1 ? size_.p : p_row_;
    for_tiles<T>(size_.n, chunk_.count, [&](auto shape, int n, int t) {
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(units<U>(size_.p), state_rows_.data + n * row, row, dyt_ + t, q_step);
      V sums[shape.vecs];
      for (int i = 0; i < shape.vecs; ++i) sums[i] = V(T(0));
      tile.each([&](int r, int c, V sum) {
        const std::int64_t at = (n + r) * q_step + t + c;
        const V grad = sum * load(chunk_.enter + t + c);
        store(dCt_ + at, grad + load(dCt_ + at));
        sums[c / lanes] = fma(grad, load(Ct_ + at), sums[c / lanes]);
      });
      for (int i = 0; i < shape.vecs; ++i)
        store(entered_by_ + t + i * lanes, sums[i] + load(entered_by_ + t + i * lanes));
    });
  }

  T dot(const T* state, const T* dstate) const {
    V total(T(0));
    for (int n = 0; n < size_.n; ++n)
      for (int c = 0; c < size_.p; c += lanes)
        total = fma(load_upto(state + n * std::int64_t{size_.p} + c, size_.p - c),
                    load(dstate + n * std::int64_t{size_.p_step} + c), total);
    return sum(total);
  }

  // Gradients of the step sizes. Token l's decay lies on the way from s to t for s < l <= t: crossed_ sums these products
  // of M and dM; on the way from the state before the chunk to t >= l; from s < l to the state after it; and `across`.
  void steps(std::int64_t head, int i, T across, const Sums<T>& sums) {
    const int q = chunk_.count;
    V passing[256 / lanes];
    for (int s = 0; s < q; s += lanes) passing[s / lanes] = V(T(0));
    for (int l = q - 1; l >= 0; --l) {
      V total(T(0));
      for (int s = 0; s <= l; s += lanes) {
        V& part = passing[s / lanes];
        part += load(T_ + l * std::int64_t{size_.q_step} + s);
        total += s + lanes <= l ? part : chunk_.before(l, s, part);
      }
      crossed_[l] = sum(total);
    }
    const T rate = static_cast<const T*>(p_.A)[head];
    double dA = 0, dbias = 0;
    T after = across;
    for (int l = q - 1; l >= 0; --l) {
      after += entered_by_[l];
      crossed_[l] += after;
    }
    T before = T(0);
    for (int l = 0; l < q; ++l) {
      const T dlog = crossed_[l] + before;
      before += left_[l];
      const std::int64_t at = std::int64_t{l} * chunk_.heads_step + i;
      const T grad = fma(V(dlog), V(rate), V(sum(load(dots_ + l * lanes))))[0] * chunk_.slopes[at];
      dA += static_cast<double>(dlog) * static_cast<double>(chunk_.dt[l]);
      dbias += static_cast<double>(grad);
      ddt_[at] = grad;
    }
    sums.dA[i] += dA;
    sums.ddt_bias[i] += dbias;
  }

  void update(T* dstate) {
    const std::int64_t p_step = size_.p_step;
    for_tiles<T>(size_.n, size_.p, [&](auto shape, int n, int c) {
      Tile<T, shape.rows, shape.vecs> tile;
      T* at = dstate + n * p_step + c;
      tile.each([&](int r, int i, V& sum) { sum = V(chunk_.across) * load(at + r * p_step + i); });
      tile.add_columns(units<U>(chunk_.count), C_columns_.data + n, size_.n_step, entered_columns_.data + c, p_step);
      tile.each([&](int r, int i, V sum) { store(at + r * p_step + i, sum); });
    });
  }

  // dB and dC of the run's heads, their ddt
  void weights(int group, std::int64_t head, int heads, const Sums<T>& sums) {
    const int q = chunk_.count;
    const std::int64_t q_step = size_.q_step, n_step = size_.n_step;
    for_tiles<T>(size_.n, q, [&](auto shape, int n, int s) {
      Tile<T, shape.rows, shape.vecs> tile;
      T* at = dBt_ + n * q_step + s;
      tile.each([&](int r, int i, V& sum) { sum = load(at + r * q_step + i); });
      tile.add_columns(q - s, chunk_.C + s * n_step + n, n_step, dG_ + s * q_step + s, q_step);
      tile.each([&](int r, int i, V sum) { store(at + r * q_step + i, sum); });
    });
    transpose<T>(weights_, size_.n_step, dBt_, size_.q_step, size_.n, q);
    for (int s = 0; s < q; ++s)
      for (int n = 0; n < size_.n; n += lanes)
        gather(sums.dB, chunk_.row[s], group, n, load(weights_ + s * n_step + n), sums.first);

    transpose<T>(weights_, size_.n_step, dCt_, size_.q_step, size_.n, q);
    for_tiles<T>(q, size_.n, [&](auto shape, int t, int n) {
      Tile<T, shape.rows, shape.vecs> tile;
      tile.each([&](int r, int i, V& sum) { sum = load(weights_ + (t + r) * n_step + n + i); });
      tile.add_rows(t + shape.rows, dG_ + t * q_step, q_step, chunk_.B + n, n_step);
      tile.each([&](int r, int i, V sum) { gather(sums.dC, chunk_.row[t + r], group, n + i, sum, sums.first); });
    });

    for (int t = 0; t < q; ++t)
      for (int i = 0; i < heads; ++i) {
        const std::int64_t at = chunk_.row[t] * p_.nheads + head + i;
        const T grad = ddt_[t * std::int64_t{chunk_.heads_step} + i];
        if (p_.wide)
          static_cast<T*>(p_.ddt)[at] = grad;
        else
          from_float(static_cast<S*>(p_.ddt) + at, grad);
      }
  }

  SSMKIT_INLINE void gather(T* out, std::int64_t row, int group, int n, V value, bool first) {
    T* at = out + (row * p_.ngroups + group) * size_.n + n;
    const int left = size_.n - n;
    store_upto(at, first ? value : value + load_upto(at, left), left);
  }
  SSMKIT_INLINE void put(void* out, std::int64_t at, V value, int left) {
    if (p_.wide)
      store_upto(static_cast<T*>(out) + at, value, left);
    else
      store_upto(static_cast<S*>(out) + at, value, left);
  }
  void put_row(void* out, std::int64_t row, std::int64_t head) {
    for (int c = 0; c < size_.p; c += lanes) put(out, (row * p_.nheads + head) * size_.p + c, V(T(0)), size_.p - c);
  }

  const SsdBackward& p_;
  SsdChunk<S> chunk_;
  const SsdSizes<T> size_;
  const std::int64_t state_size_, n_row_, p_row_;
  Scratch<T> Bt_, Ct_, dBt_, dCt_;     // (n, q)
  Scratch<T> weights_;                 // (q, n)
  Scratch<T> G_, dG_, M_, T_;          // (q, q): rows t, columns s
  Scratch<T> x_, dy_, entered_;        // (q, p)
  Scratch<T> dots_;                    // (q, lanes)
  Scratch<T> crossed_, left_, entered_by_;  // (q,)
  Scratch<T> dD_;                      // (p,)
  Scratch<T> ddt_;                     // (q, heads)
  // operands: pairs of what lies along the rows, or along the columns
  Units<T, U> B_rows_, C_columns_;                      // (q, n)
  Units<T, U> x_rows_, dy_rows_, dstate_rows_, state_rows_;  // (q, p), (q, p), (n, p), (n, p)
  Units<T, U> dy_columns_, entered_columns_, dstate_columns_, M_columns_;  // (q, p), (q, p), (n, p), (q, q)
  Scratch<U> xt_, dyt_;                                 // (p, q)
};

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
