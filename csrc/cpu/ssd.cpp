#include "cpu/ssd.h"

#include "cpu/ssd_chunk.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Chunks of one run of heads, one after another. A state is kept transposed, (dstate, headdim), so that channels lie in
// lanes everywhere; all products are of the form (columns of A) x (rows of B), see tiles.h.
template <typename S>
class ForwardRun {
 public:
  using T = acc_t<S>;
  using V = Vec<T>;
  static constexpr int lanes = V::size;

  ForwardRun(const SsdForward& p, int heads)
      : p_(p), chunk_(p, heads), size_(chunk_.size), C_(std::int64_t{size_.n} * size_.q_step),
        G_(chunk_.rows() * size_.q_step), M_(chunk_.rows() * size_.q_step), x_(chunk_.rows() * size_.p_step),
        weighted_(chunk_.rows() * size_.p_step), state_size_(std::int64_t{size_.n} * size_.p_step) {}

  // Chunks [begin, end) of a sequence. states: (heads, n, p_step), read and written. outputs: y and what else is asked
  // for, or the states alone. decays: (heads,) the decay over all these chunks.
  void walk(const SsdSequence& sequence, std::int64_t begin, std::int64_t end, int group, std::int64_t head, int heads,
            T* states, bool known_zero, bool outputs, T* decays) {
    for (int i = 0; i < heads; ++i) decays[i] = T(1);
    for (std::int64_t index = begin; index < end; ++index) {
      chunk_.load_tokens(sequence, index, group, head, heads, false);
      if (outputs) similarities();
      for (int i = 0; i < heads; ++i) {
        T* state = states + i * state_size_;
        chunk_.load_head(head + i, i);
        load_x(head + i, outputs);
        const bool zero = known_zero && index == begin;
        if (outputs) {
          keep(state, sequence.slot + index, head + i);
          output(state, zero, head + i);
        }
        update(state, zero);
        decays[i] = decays[i] * chunk_.across;
      }
    }
  }

 private:
  // G^T[s][t] = B_s . C_t, shared by the heads of the group
  void similarities() {
    const int q = chunk_.count;
    transpose<T>(C_, size_.q_step, chunk_.C, size_.n_step, q, size_.n);
    for_tiles<T>(q, q, [&](auto shape, int s, int t) {
      if (t + shape.vecs * lanes <= s) return;  // only s <= t is read
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(size_.n, chunk_.B + s * std::int64_t{size_.n_step}, size_.n_step, C_ + t, size_.q_step);
      tile.each([&](int r, int c, V sum) { store(G_ + (s + r) * std::int64_t{size_.q_step} + t + c, sum); });
    });
  }

  // x of one head, and x times its step and its decay to the end of the chunk
  void load_x(std::int64_t head, bool plain) {
    const S* x = static_cast<const S*>(p_.x) + head * size_.p;
    for (int s = 0; s < chunk_.count; ++s) {
      T* out = x_ + s * std::int64_t{size_.p_step};
      T* weighted = weighted_ + s * std::int64_t{size_.p_step};
      const S* in = x + chunk_.row[s] * p_.x_stride;
      const V weight(chunk_.leave[s] * chunk_.dt[s]);
      for (int c = 0; c < size_.p; c += lanes) {
        // the next head's channels lie behind: rows are too far apart for the hardware to foresee them
        __builtin_prefetch(in + size_.p + c);
        const V value = chunk_.pad[s] ? V(T(0)) : load_upto(in + c, size_.p - c);
        if (plain) store(out + c, value);
        store(weighted + c, weight * value);
      }
    }
  }

  void keep(const T* state, std::int64_t slot, std::int64_t head) {
    if (!p_.checkpoints) return;
    T* out = static_cast<T*>(p_.checkpoints) + (slot * p_.nheads + head) * size_.n * size_.p;
    for (int n = 0; n < size_.n; ++n)
      for (int c = 0; c < size_.p; c += lanes)
        store_upto(out + n * std::int64_t{size_.p} + c, load(state + n * std::int64_t{size_.p_step} + c), size_.p - c);
  }

  // y_t = exp(cs_t) C_t H + sum_{s <= t} (C_t . B_s) exp(cs_t - cs_s) dt_s x_s
  void output(const T* state, bool zero, std::int64_t head) {
    const int q = chunk_.count;
    const std::int64_t q_step = size_.q_step, p_step = size_.p_step;
    for (int s = 0; s < q; ++s) {
      const V dt(chunk_.dt[s]);
      // a tile of rows may begin up to kTileRows - 1 tokens before s
      const int first = s < kTileRows ? 0 : (s - kTileRows + 1) / lanes * lanes;
      for (int t = first; t < q; t += lanes) {
        const V decay = chunk_.template decay<false>(s, t);
        store(M_ + s * q_step + t, decay * dt * load(G_ + s * q_step + t));
      }
    }
    for_tiles<T>(q, size_.p, [&](auto shape, int t, int c) {
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      if (!zero) {
        tile.add_rows(size_.n, chunk_.C + t * std::int64_t{size_.n_step}, size_.n_step, state + c, p_step);
        tile.each([&](int r, int, V& sum) { sum = sum * V(chunk_.enter[t + r]); });
      }
      tile.add_columns(t + shape.rows, M_ + t, q_step, x_ + c, p_step);
      tile.each([&](int r, int i, V sum) { finish(sum, t + r, c + i, head); });
    });
  }

  SSMKIT_INLINE void finish(V y, int t, int c, std::int64_t head) {
    const int left = size_.p - c;
    const std::int64_t row = chunk_.row[t], at = (row * p_.nheads + head) * size_.p + c;
    if (p_.D) y = fma(load_upto(static_cast<const T*>(p_.D) + head * size_.p + c, left), load(x_ + t * std::int64_t{size_.p_step} + c), y);
    if (p_.addend) y += load_upto(static_cast<const T*>(p_.addend) + at, left);
    if (p_.ungated) store_upto(static_cast<T*>(p_.ungated) + at, y, left);
    if (p_.z) y = y * silu(load_upto(static_cast<const S*>(p_.z) + row * p_.z_stride + head * size_.p + c, left));
    if (chunk_.pad[t]) y = V(T(0));
    if (p_.wide)
      store_upto(static_cast<T*>(p_.y) + at, y, left);
    else
      store_upto(static_cast<S*>(p_.y) + at, y, left);
  }

  // H <- exp(cs_end) H + sum_s exp(cs_end - cs_s) dt_s B_s x_s^T
  void update(T* state, bool zero) {
    const std::int64_t p_step = size_.p_step;
    for_tiles<T>(size_.n, size_.p, [&](auto shape, int n, int c) {
      Tile<T, shape.rows, shape.vecs> tile;
      T* at = state + n * p_step + c;
      if (zero)
        tile.clear();
      else
        tile.each([&](int r, int i, V& sum) { sum = V(chunk_.across) * load(at + r * p_step + i); });
      tile.add_columns(chunk_.count, chunk_.B + n, size_.n_step, weighted_ + c, p_step);
      tile.each([&](int r, int i, V sum) { store(at + r * p_step + i, sum); });
    });
  }

  const SsdForward& p_;
  SsdChunk<S> chunk_;
  const SsdSizes<T> size_;
  Scratch<T> C_;         // (n, q)
  Scratch<T> G_;         // (q, q) B_s . C_t
  Scratch<T> M_;         // (q, q) G^T with decay and step
  Scratch<T> x_;         // (q, p)
  Scratch<T> weighted_;  // (q, p)
  const std::int64_t state_size_;
};

template <typename S>
void forward(const SsdForward& p) {
  using T = acc_t<S>;
  const SsdSizes<T> size(p);
  const std::int64_t state_size = std::int64_t{size.n} * size.p_step, given = std::int64_t{size.n} * size.p;
  const T* initial = static_cast<const T*>(p.initial_state);
  T* final_state = static_cast<T*>(p.final_state);
  const std::int64_t units = p.nseq * p.nheads, most = heads_at_once(size);
  if (units == 0) return;

  if (units >= p.threads) {
    for_runs<T>(p, most, [&](std::int64_t s, int group, std::int64_t head, int heads, int, bool) {
      Scratch<T> states(heads * state_size), decays(heads);
      ForwardRun<S> run(p, heads);
      const SsdSequence sequence(p, s);
      const std::int64_t first = s * p.nheads + head;
      for (int i = 0; i < heads; ++i)
        read_state<T>(states + i * state_size, initial ? initial + (first + i) * given : nullptr, size);
      run.walk(sequence, 0, sequence.chunks(p.chunk), group, head, heads, states, !initial, true, decays);
      for (int i = 0; i < heads; ++i) write_state<T>(final_state + (first + i) * given, states + i * state_size, size);
    });
    return;
  }

  // Fewer heads than threads: every sequence is cut into splits. Each but the last finds its own end state, these are
  // chained, then each walks again from the state before it.
  const std::int64_t splits = (p.threads + units - 1) / units, per_group = p.nheads / p.ngroups;
  Scratch<T> states(units * splits * state_size), decays(units * splits);
  const auto for_splits = [&](bool outputs) {
    parallel_for(units * splits, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
      ForwardRun<S> run(p, 1);
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t split = item % splits, s = item / splits / p.nheads, head = item / splits % p.nheads;
        const SsdSequence sequence(p, s);
        const std::int64_t chunks = sequence.chunks(p.chunk);
        T* state = states + item * state_size;
        if (!outputs && split == splits - 1) continue;
        if (!outputs) read_state<T>(state, nullptr, size);
        run.walk(sequence, chunks * split / splits, chunks * (split + 1) / splits, static_cast<int>(head / per_group),
                 head, 1, state, !outputs, outputs, decays + item);
      }
    });
  };
  for_splits(false);
  Scratch<T> before(state_size);
  for (std::int64_t unit = 0; unit < units; ++unit) {
    read_state<T>(before, initial ? initial + unit * given : nullptr, size);
    for (std::int64_t item = unit * splits; item < (unit + 1) * splits; ++item) {
      T* state = states + item * state_size;
      const bool last = item + 1 == (unit + 1) * splits;
      for (int n = 0; n < size.n; ++n)
        for (int c = 0; c < size.p; ++c) {
          const std::int64_t i = n * std::int64_t{size.p_step} + c;
          const T carried = before[i], end = last ? T(0) : state[i];
          state[i] = carried;
          before[i] = last ? carried : decays[item] * carried + end;
        }
    }
  }
  for_splits(true);
  for (std::int64_t unit = 0; unit < units; ++unit)
    write_state<T>(final_state + unit * given, states + ((unit + 1) * splits - 1) * state_size, size);
}

}  // namespace

void ssd_forward(const SsdForward& p) {
  switch (p.dtype) {
    case DType::float32: return forward<float>(p);
    case DType::float64: return forward<double>(p);
    case DType::bfloat16: return forward<bfloat16>(p);
    case DType::float16: return forward<float16>(p);
    default: return;
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
