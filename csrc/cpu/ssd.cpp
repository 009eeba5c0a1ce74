#include "cpu/ssd.h"

#include "cpu/ssd_chunk.h"
#include "cpu/ssd_plan.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Chunks of one run of heads, one after another. A state is kept transposed, (dstate, headdim), so that channels lie in
// lanes everywhere; all products are of the form (columns of A) x (rows of B), see tiles.h, their operands in units U.
template <typename S, typename U>
class ForwardRun {
 public:
  using T = acc_t<S>;
  using V = Vec<T>;
  static constexpr int lanes = V::size, terms = kTerms<U>;

  ForwardRun(const SsdForward& p, int heads)
      : p_(p), chunk_(p, heads), size_(chunk_.size), state_size_(std::int64_t{size_.n} * size_.p_step),
        row_step_(padded<U>(units<U>(size_.n))), B_rows_(chunk_.B, size_.q, row_step_),
        C_rows_(chunk_.C, size_.q, row_step_), B_columns_(chunk_.B, units<U>(size_.q), size_.n_step),
        C_(units<U>(size_.n) * std::int64_t{size_.q_step}), G_(chunk_.rows() * size_.q_step),
        M_(chunk_.rows() * size_.q_step), x_(chunk_.rows() * size_.p_step), weighted_(chunk_.rows() * size_.p_step),
        state_(nullptr, units<U>(size_.n), size_.p_step) {}

  // Chunks [begin, end) of a sequence. states: (heads, n, p_step), read and, unless for outputs alone, written.
  // decays: (heads,) the decay over all these chunks.
  void walk(const SsdSequence& sequence, std::int64_t begin, std::int64_t end, int group, std::int64_t head, int heads,
            T* states, bool known_zero, Work work, T* decays) {
    for (int i = 0; i < heads; ++i) decays[i] = T(1);
    for (std::int64_t index = begin; index < end; ++index) {
      chunk_.load_tokens(sequence, index, group, head, heads, false);
      if (work != Work::outputs) B_columns_.along_columns(chunk_.B, size_.n_step, chunk_.count, size_.n);
      if (work != Work::state) similarities();
      for (int i = 0; i < heads; ++i) {
        T* state = states + i * state_size_;
        chunk_.load_head(head + i, i);
        load_x(head + i);
        const bool zero = known_zero && index == begin;
        if (work != Work::state) {
          keep(state, sequence.slot + index, head + i);
          output(state, zero, head + i);
        }
        if (work != Work::outputs) update(state, zero);
        decays[i] = decays[i] * chunk_.across;
      }
    }
  }

 private:
  // G^T[s][t] = B_s . C_t, shared by the heads of the group
  void similarities() {
    const int q = chunk_.count;
    B_rows_.along_rows(chunk_.B, size_.n_step, q, size_.n);
    C_rows_.along_rows(chunk_.C, size_.n_step, q, size_.n);
    transpose_units<U>(C_, size_.q_step, C_rows_.data, row_step_, q, units<U>(size_.n));
    for_tiles<T>(q, q, [&](auto shape, int s, int t) {
      if (t + shape.vecs * lanes <= s) return;  // only s <= t is read
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(units<U>(size_.n), B_rows_.data + s * row_step_, row_step_, C_ + t, size_.q_step);
      tile.each([&](int r, int c, V sum) { store(G_ + (s + r) * std::int64_t{size_.q_step} + t + c, sum); });
    });
  }

  // x of one head, and x times its step and its decay to the end of the chunk
  void load_x(std::int64_t head) {
    const S* x = static_cast<const S*>(p_.x) + head * size_.p;
    const auto value = [&](int s, int c) {
      if (s >= chunk_.count || chunk_.pad[s]) return V(T(0));
      const S* in = x + chunk_.row[s] * p_.x_stride;
      // the next head's channels lie behind: rows are too far apart for the hardware to foresee them
      __builtin_prefetch(in + size_.p + c);
      return load_upto(in + c, size_.p - c);
    };
    for (int s = 0; s < chunk_.count; s += terms) {
      U* out = x_ + s / terms * std::int64_t{size_.p_step};
      U* weighted = weighted_ + s / terms * std::int64_t{size_.p_step};
      const V weight(chunk_.leave[s] * chunk_.dt[s]);
      for (int c = 0; c < size_.p; c += lanes) {
        const V first = value(s, c);
        if constexpr (terms == 1) {
          store(out + c, first);
          store(weighted + c, weight * first);
        } else {
          const V second = value(s + 1, c), next(chunk_.leave[s + 1] * chunk_.dt[s + 1]);
          store(out + c, first, second);
          store(weighted + c, weight * first, next * second);
        }
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
    for (int s = 0; s < q; s += terms) {
      // a tile of rows may begin up to kTileRows - 1 tokens before s
      const int first = s < kTileRows ? 0 : (s - kTileRows + 1) / lanes * lanes;
      for (int t = first; t < q; t += lanes) {
        if constexpr (terms == 1)
          store(M_ + s * q_step + t, weight(s, t));
        else
          store(M_ + s / terms * q_step + t, weight(s, t), s + 1 < q ? weight(s + 1, t) : V(T(0)));
      }
    }
    if (!zero) state_.along_columns(state, size_.p_step, size_.n, size_.p);
    for_tiles<T>(q, size_.p, [&](auto shape, int t, int c) {
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      if (!zero) {
        tile.add_rows(units<U>(size_.n), C_rows_.data + t * row_step_, row_step_, state_.data + c, p_step);
        tile.each([&](int r, int, V& sum) { sum = sum * V(chunk_.enter[t + r]); });
      }
      tile.add_columns(units<U>(t + shape.rows), M_ + t, q_step, x_ + c, p_step);
      tile.each([&](int r, int i, V sum) { finish(sum, t + r, c + i, head); });
    });
  }

  SSMKIT_INLINE V weight(int s, int t) const {
    return chunk_.template decay<false>(s, t) * V(chunk_.dt[s]) * load(G_ + s * std::int64_t{size_.q_step} + t);
  }

  SSMKIT_INLINE void finish(V y, int t, int c, std::int64_t head) {
    const int left = size_.p - c;
    const std::int64_t row = chunk_.row[t], channel = head * size_.p + c, at = row * p_.nheads * size_.p + channel;
    if (p_.D)
      y = fma(load_upto(static_cast<const T*>(p_.D) + channel, left),
              load_upto(static_cast<const S*>(p_.x) + row * p_.x_stride + channel, left), y);
    if (p_.addend) y += load_upto(static_cast<const T*>(p_.addend) + at, left);
    if (p_.ungated) store_upto(static_cast<T*>(p_.ungated) + at, y, left);
    if (p_.z) y = y * silu(load_upto(static_cast<const S*>(p_.z) + row * p_.z_stride + channel, left));
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
      tile.add_columns(units<U>(chunk_.count), B_columns_.data + n, size_.n_step, weighted_ + c, p_step);
      tile.each([&](int r, int i, V sum) { store(at + r * p_step + i, sum); });
    });
  }

  const SsdForward& p_;
  SsdChunk<S> chunk_;
  const SsdSizes<T> size_;
  const std::int64_t state_size_, row_step_;
  Units<T, U> B_rows_, C_rows_;  // (q, n): pairs of states
  Units<T, U> B_columns_;        // (q, n): pairs of tokens
  Scratch<U> C_;                 // (n, q)
  Scratch<T> G_;                 // (q, q) B_s . C_t
  Scratch<U> M_;                 // (q, q) G^T with decay and step
  Scratch<U> x_, weighted_;      // (q, p)
  Units<T, U> state_;            // (n, p): pairs of states
};

template <typename S, typename U>
void forward(const SsdForward& p) {
  using T = acc_t<S>;
  using Run = ForwardRun<S, U>;
  const SsdSizes<T> size(p);
  const std::int64_t state_size = std::int64_t{size.n} * size.p_step, given = std::int64_t{size.n} * size.p;
  const std::int64_t per_group = p.ngroups ? p.nheads / p.ngroups : 0;
  const T* initial = static_cast<const T*>(p.initial_state);
  T* final_state = static_cast<T*>(p.final_state);
  if (p.nseq * p.nheads == 0) return;

  const SsdItems items(p);
  if (!items.better_than_heads()) {
    for_runs<T>(p, heads_at_once(size), [&](std::int64_t s, int group, std::int64_t head, int heads, int, bool) {
      Scratch<T> states(heads * state_size), decays(heads);
      Run run(p, heads);
      const SsdSequence sequence(p, s);
      const std::int64_t first = s * p.nheads + head;
      for (int i = 0; i < heads; ++i)
        read_state<T>(states + i * state_size, initial ? initial + (first + i) * given : nullptr, size);
      run.walk(sequence, 0, sequence.chunks(p.chunk), group, head, heads, states, !initial, Work::both, decays);
      for (int i = 0; i < heads; ++i) write_state<T>(final_state + (first + i) * given, states + i * state_size, size);
    });
    return;
  }

  // Every chunk finds what it adds to the state; the states are chained; every chunk finds its outputs.
  Scratch<T> states(items.count() * p.nheads * state_size), decays(items.count() * p.nheads);
  const auto each_chunk = [&](Work work) {
    items.each([&] { return Run(p, static_cast<int>(per_group)); },
               [&](Run& run, std::int64_t item, const SsdSequence& sequence, std::int64_t index, int group) {
                 const std::int64_t head = group * per_group, at = item * p.nheads + head;
                 run.walk(sequence, index, index + 1, group, head, static_cast<int>(per_group), states + at * state_size,
                          work == Work::state || (index == 0 && !initial), work, decays + at);
               });
  };
  each_chunk(Work::state);
  parallel_for(p.nseq * p.nheads, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    Scratch<T> carried(state_size);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t s = unit / p.nheads, head = unit % p.nheads;
      read_state<T>(carried, initial ? initial + unit * given : nullptr, size);
      for (std::int64_t item = items.begin(s); item < items.begin(s + 1); ++item)
        pass_on<T>(carried, states + (item * p.nheads + head) * state_size, decays[item * p.nheads + head], size);
      write_state<T>(final_state + unit * given, carried, size);
    }
  });
  each_chunk(Work::outputs);
}

}  // namespace

void ssd_forward(const SsdForward& p) {
#if defined(SSMKIT_BF16)
  return p.dtype == DType::bfloat16 ? forward<bfloat16, Pair>(p) : avx512::ssd_forward(p);
#else
  switch (p.dtype) {
    case DType::float32: return forward<float, float>(p);
    case DType::float64: return forward<double, double>(p);
    case DType::bfloat16: return forward<bfloat16, float>(p);
    case DType::float16: return forward<float16, float>(p);
    default: return;
  }
#endif
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
