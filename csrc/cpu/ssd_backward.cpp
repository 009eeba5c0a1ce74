#include "cpu/ssd.h"
#include "cpu/ssd_chunk.h"

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
template <typename S>
class BackwardRun {
 public:
  using T = acc_t<S>;
  using V = Vec<T>;
  static constexpr int lanes = V::size;

  BackwardRun(const SsdBackward& p, int heads)
      : p_(p), chunk_(p, heads), size_(chunk_.size), state_size_(std::int64_t{size_.n} * size_.p_step),
        Bt_(std::int64_t{size_.n} * size_.q_step), Ct_(std::int64_t{size_.n} * size_.q_step),
        dBt_(std::int64_t{size_.n} * size_.q_step), dCt_(std::int64_t{size_.n} * size_.q_step),
        weights_(chunk_.rows() * size_.n_step), G_(chunk_.rows() * size_.q_step), dG_(chunk_.rows() * size_.q_step),
        M_(chunk_.rows() * size_.q_step), T_(chunk_.rows() * size_.q_step), x_(chunk_.rows() * size_.p_step),
        dy_(chunk_.rows() * size_.p_step), entered_(chunk_.rows() * size_.p_step),
        xt_(std::int64_t{size_.p} * size_.q_step), dyt_(std::int64_t{size_.p} * size_.q_step),
        dots_(std::int64_t{size_.q} * lanes), crossed_(size_.q_step), left_(size_.q_step), entered_by_(size_.q_step),
        dD_(size_.p_step), ddt_(std::int64_t{size_.q} * chunk_.heads_step) {}

  // dstates: (heads, n, p_step), gradient of the state after chunk end - 1, and on return of the one before chunk begin.
  // With outputs everything else too; without, only dstates and decays (heads,), the decay over all these chunks.
  void walk(const SsdSequence& sequence, std::int64_t begin, std::int64_t end, int group, std::int64_t head, int heads,
            T* dstates, bool outputs, T* decays, const Sums<T>& sums) {
    for (int i = 0; i < heads; ++i) decays[i] = T(1);
    for (std::int64_t index = end; index-- > begin;) {
      chunk_.load_tokens(sequence, index, group, head, heads, outputs);
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
        update(dstate);
        decays[i] = decays[i] * chunk_.across;
      }
      if (outputs) weights(group, head, heads, sums);
    }
  }

 private:
  // G[t][s] = C_t . B_s, shared by the heads of the group; and zeros where the heads add up
  void similarities() {
    const int q = chunk_.count;
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
    if (!all) return;
    for (int c = 0; dD && c < size_.p; ++c) dD[c] += dD_[c];
    transpose<T>(xt_, size_.q_step, x_, size_.p_step, q, size_.p);
    transpose<T>(dyt_, size_.q_step, dy_, size_.p_step, q, size_.p);
  }

  // dM[t][s] = dy_t . x_s, and what follows from it alone
  void products() {
    const int q = chunk_.count;
    const std::int64_t q_step = size_.q_step;
    for_tiles<T>(q, q, [&](auto shape, int t, int s) {
      if (s >= t + shape.rows) return;
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(size_.p, dy_ + t * std::int64_t{size_.p_step}, size_.p_step, xt_ + s, q_step);
      tile.each([&](int r, int c, V dM) {
        const std::int64_t at = (t + r) * q_step + s + c;
        const V L = chunk_.template decay<true>(t + r, s + c), M = L * load(G_ + at);
        const V step_dM = dM * load(chunk_.dt + s + c);
        store(M_ + at, M);
        store(T_ + at, step_dM * M);
        store(dG_ + at, fma(step_dM, L, load(dG_ + at)));
      });
    });
  }

  // dx = dt du + D dy, and the rows' products du . x
  void inputs(const T* dstate, std::int64_t head) {
    const int q = chunk_.count;
    const std::int64_t q_step = size_.q_step, p_step = size_.p_step;
    for (int s = 0; s < q; ++s) store(dots_ + s * lanes, V(T(0)));
    for_tiles<T>(q, size_.p, [&](auto shape, int s, int c) {
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_columns(size_.n, Bt_ + s, q_step, dstate + c, p_step);
      tile.each([&](int r, int, V& sum) { sum = sum * V(chunk_.leave[s + r]); });
      tile.add_columns(q - s, M_ + s * q_step + s, q_step, dy_ + s * p_step + c, p_step);
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
    for_tiles<T>(size_.n, chunk_.count, [&](auto shape, int n, int s) {
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(size_.p, dstate + n * std::int64_t{size_.p_step}, size_.p_step, xt_ + s, q_step);
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
    for_tiles<T>(size_.n, chunk_.count, [&](auto shape, int n, int t) {
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(size_.p, state + n * std::int64_t{size_.p}, size_.p, dyt_ + t, q_step);
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
      tile.add_columns(chunk_.count, chunk_.C + n, size_.n_step, entered_ + c, p_step);
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
  const std::int64_t state_size_;
  Scratch<T> Bt_, Ct_, dBt_, dCt_;     // (n, q)
  Scratch<T> weights_;                 // (q, n)
  Scratch<T> G_, dG_, M_, T_;          // (q, q): rows t, columns s
  Scratch<T> x_, dy_, entered_;        // (q, p)
  Scratch<T> xt_, dyt_;                // (p, q)
  Scratch<T> dots_;                    // (q, lanes)
  Scratch<T> crossed_, left_, entered_by_;  // (q,)
  Scratch<T> dD_;                      // (p,)
  Scratch<T> ddt_;                     // (q, heads)
};

// Which thread takes a unit under parallel_for's split.
inline std::int64_t thread_of(std::int64_t unit, std::int64_t units, std::int64_t threads) {
  const std::int64_t parts = units < threads ? units : threads;
  return ((unit + 1) * parts - 1) / units;
}

// out[i] = parts[0][i] + parts[1][i] + ..., in this order
template <typename S>
void add_parts(const SsdBackward& p, void* out, const acc_t<S>* parts, std::int64_t part_size, std::int64_t nparts,
               std::int64_t begin, std::int64_t count) {
  using T = acc_t<S>;
  for (std::int64_t i = begin; i < begin + count; i += Vec<T>::size) {
    const int left = static_cast<int>(begin + count - i < Vec<T>::size ? begin + count - i : Vec<T>::size);
    Vec<T> total = load_upto(parts + i, left);
    for (std::int64_t part = 1; part < nparts; ++part) total += load_upto(parts + part * part_size + i, left);
    if (p.wide)
      store_upto(static_cast<T*>(out) + i, total, left);
    else
      store_upto(static_cast<S*>(out) + i, total, left);
  }
}

template <typename S>
void backward(const SsdBackward& p) {
  using T = acc_t<S>;
  const SsdSizes<T> size(p);
  const std::int64_t state_size = std::int64_t{size.n} * size.p_step, given = std::int64_t{size.n} * size.p;
  const std::int64_t units = p.nseq * p.nheads, per_group = p.nheads / p.ngroups, width = p.ngroups * p.dstate;
  const std::int64_t rows = p.batch * p.seqlen;
  const T* dfinal = static_cast<const T*>(p.dfinal_state);
  T* dinitial = static_cast<T*>(p.dinitial_state);

  // parts of dB and dC: one for each thread that has heads of a group
  std::int64_t nparts = 1;
  for (std::int64_t u = 0; u < units; u += per_group) {
    const std::int64_t spread = thread_of(u + per_group - 1, units, p.threads) - thread_of(u, units, p.threads) + 1;
    if (spread > nparts) nparts = spread;
  }
  Scratch<T> dB(nparts * rows * width), dC(nparts * rows * width);
  Scratch<double> dA(units), dbias(units), dD(p.dD ? units * size.p : 1);
  for (std::int64_t u = 0; u < units; ++u) dA[u] = dbias[u] = 0;
  for (std::int64_t i = 0; i < (p.dD ? units * size.p : 0); ++i) dD[i] = 0;

  for_runs<T>(p, heads_at_once(size), [&](std::int64_t s, int group, std::int64_t head, int heads, int thread, bool first) {
    Scratch<T> dstates(heads * state_size), decays(heads);
    BackwardRun<S> run(p, heads);
    const SsdSequence sequence(p, s);
    const std::int64_t unit = s * p.nheads + head;
    const std::int64_t part = thread - thread_of(s * p.nheads + group * per_group, units, p.threads);
    for (int i = 0; i < heads; ++i)
      read_state<T>(dstates + i * state_size, dfinal ? dfinal + (unit + i) * given : nullptr, size);
    const Sums<T> sums{dB + part * rows * width, dC + part * rows * width, first, dA + unit,
                       p.dD ? dD + unit * size.p : nullptr, dbias + unit};
    run.walk(sequence, 0, sequence.chunks(p.chunk), group, head, heads, dstates, true, decays, sums);
    if (dinitial)
      for (int i = 0; i < heads; ++i) write_state<T>(dinitial + (unit + i) * given, dstates + i * state_size, size);
  });

  parallel_for(p.nseq * p.ngroups, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t item = begin; item < end; ++item) {
      const SsdSequence sequence(p, item / p.ngroups);
      const std::int64_t u = item * per_group, group = item % p.ngroups;
      const std::int64_t used = thread_of(u + per_group - 1, units, p.threads) - thread_of(u, units, p.threads) + 1;
      for (std::int64_t row = sequence.row; row < sequence.row + sequence.length; ++row) {
        const std::int64_t at = row * width + group * p.dstate;
        add_parts<S>(p, p.dB, dB, rows * width, used, at, p.dstate);
        add_parts<S>(p, p.dC, dC, rows * width, used, at, p.dstate);
      }
    }
  });
  const auto over_sequences = [&](void* out, const double* parts, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      double total = 0;
      for (std::int64_t s = 0; s < p.nseq; ++s) total += parts[s * count + i];
      static_cast<T*>(out)[i] = static_cast<T>(total);
    }
  };
  over_sequences(p.dA, dA, p.nheads);
  if (p.dD) over_sequences(p.dD, dD, p.nheads * size.p);
  if (p.ddt_bias) over_sequences(p.ddt_bias, dbias, p.nheads);
}

}  // namespace

void ssd_backward(const SsdBackward& p) {
  switch (p.dtype) {
    case DType::float32: return backward<float>(p);
    case DType::float64: return backward<double>(p);
    case DType::bfloat16: return backward<bfloat16>(p);
    case DType::float16: return backward<float16>(p);
    default: return;
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
