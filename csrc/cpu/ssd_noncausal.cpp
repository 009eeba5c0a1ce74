// Two passes over the tokens with a sum between them. The first leaves a partial state for every block of tokens; these
// are added in the order of the blocks, whatever the number of threads; the second gives every chunk what it takes from
// the state. Backward is the same with dy C^T in place of w x B^T. All products are of the form (rows) x (rows of B), see
// tiles.h, and states are kept in both orientations where both are read.
#include "cpu/ssd_noncausal.h"

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

constexpr std::uint8_t kPad = 2;
// Tokens worked on at once, whose rows of one head stay in the nearest cache; and tokens to a partial state.
constexpr int kChunk = 64;
constexpr std::int64_t kBlock = 4 * kChunk;

// Tokens row .. row + count - 1, all of one sequence.
struct Place {
  std::int64_t sequence, row, count;
};

// Pieces of at most `length` tokens of every sequence. Packed sequences leave some of them empty.
struct Pieces {
  const SsdNoncausalParams& p;
  const std::int64_t length;

  std::int64_t per_row() const { return (p.seqlen + length - 1) / length; }
  std::int64_t count() const { return p.cu_seqlens ? p.seqlen / length + p.nseq : p.nseq * per_row(); }
  std::int64_t first(std::int64_t s) const { return p.cu_seqlens ? p.cu_seqlens[s] / length + s : s * per_row(); }
  std::int64_t of(std::int64_t s) const {
    return p.cu_seqlens ? (p.cu_seqlens[s + 1] - p.cu_seqlens[s] + length - 1) / length : per_row();
  }

  Place operator[](std::int64_t piece) const {
    std::int64_t s = 0;
    if (p.cu_seqlens) {
      // the last sequence whose pieces begin at or before this one
      for (std::int64_t high = p.nseq; high - s > 1;) {
        const std::int64_t middle = (s + high) / 2;
        (first(middle) <= piece ? s : high) = middle;
      }
    } else {
      s = piece / per_row();
    }
    const std::int64_t begin = p.cu_seqlens ? p.cu_seqlens[s] : s * p.seqlen;
    const std::int64_t end = p.cu_seqlens ? p.cu_seqlens[s + 1] : begin + p.seqlen;
    const std::int64_t row = begin + (piece - first(s)) * length, left = end - row;
    return {s, row, left < 0 ? 0 : left < length ? left : length};
  }
};

template <typename T>
struct Rows {
  const T* at;
  std::int64_t step;
};

// Tokens of one chunk, in the type T of sums.
template <typename S>
class Chunk {
 public:
  using T = acc_t<S>;
  using V = Vec<T>;
  static constexpr int lanes = V::size;

  const SsdNoncausalParams& p;
  const int n, c, n_step, c_step;  // states and channels of a head, and the steps of their padded rows
  int count = 0;
  Scratch<T> dt, slope;  // (kChunk,) dt as it is used, and its derivative by the input; 0 at pads
  T rate = 0;            // w = dt * rate

  explicit Chunk(const SsdNoncausalParams& p)
      : p(p), n(static_cast<int>(p.dstate)), c(static_cast<int>(p.headdim)), n_step(padded<T>(n)),
        c_step(padded<T>(c)), dt(kChunk + lanes), slope(kChunk + lanes) {}

  std::int64_t state_size() const { return std::int64_t{n} * c_step; }

  void move_to(const Place& place) {
    row_ = place.row, count = static_cast<int>(place.count), pads_ = false;
    if (p.flags)
      for (int i = 0; i < count; ++i) pads_ |= pad(i);
  }
  std::int64_t row(int i) const { return row_ + i; }
  bool pad(int i) const { return p.flags && (p.flags[row_ + i] & kPad); }

  std::int64_t group_of(std::int64_t head) const {
    return p.interleaved ? head % p.ngroups : head / (p.nheads / p.ngroups);
  }

  // Rows of `width` numbers that are read one number at a time: as they lie in memory where that can be.
  Rows<T> rows(T* scratch, std::int64_t step, const void* in, std::int64_t stride, std::int64_t column, int width) const {
    const S* from = static_cast<const S*>(in) + column + row_ * stride;
    if constexpr (std::is_same_v<S, T>)
      if (!pads_) return {from, stride};
    return widened(scratch, step, from, stride, width);
  }
  // Rows that are read in whole vectors; zeros at pads.
  Rows<T> vectors(T* scratch, const void* in, std::int64_t stride, std::int64_t head) const {
    return widened(scratch, c_step, static_cast<const S*>(in) + head * c + row_ * stride, stride, c);
  }

  void load_steps(std::int64_t head) {
    const S* in = static_cast<const S*>(p.dt) + row_ * p.dt_stride + head;
    S raw[kChunk] = {};
    for (int i = 0; i < count; ++i) raw[i] = in[i * p.dt_stride];
    const T* bias = static_cast<const T*>(p.dt_bias);
    for (int i = 0; i < count; i += lanes) {
      V step = load(raw + i), derivative(T(1));
      if (bias) step += V(bias[head]);
      if (p.dt_softplus) derivative = softplus_slope(step), step = softplus(step);
      store(dt + i, step), store(slope + i, derivative);
    }
    if (pads_)
      for (int i = 0; i < count; ++i)
        if (pad(i)) dt[i] = slope[i] = T(0);
    rate = -static_cast<const T*>(p.A)[head];
  }

  // state (n, c_step) = or += weights^T values
  void accumulate(T* state, bool fresh, Rows<T> weights, const T* values) const {
    for_tiles<T>(n, c, [&](auto shape, int r, int col) {
      Tile<T, shape.rows, shape.vecs> tile;
      T* to = state + r * std::int64_t{c_step} + col;
      if (fresh)
        tile.clear();
      else
        tile.each([&](int i, int j, V& sum) { sum = load(to + i * std::int64_t{c_step} + j); });
      tile.add_columns(count, weights.at + r, weights.step, values + col, c_step);
      tile.each([&](int i, int j, V sum) { store(to + i * std::int64_t{c_step} + j, sum); });
    });
  }

 private:
  Rows<T> widened(T* scratch, std::int64_t step, const S* from, std::int64_t stride, int width) const {
    for (int i = 0; i < count; ++i)
      if (pad(i))
        clear_row(scratch + i * step, width);
      else
        widen_row(scratch + i * step, from + i * stride, width);
    return {scratch, step};
  }

  std::int64_t row_ = 0;
  bool pads_ = false;
};

// states (nseq, nheads, n, c_step): of every head over every sequence, sum over tokens of weights^T values.
// fill(chunk, head, weights, values) loads both for one chunk.
template <typename S, typename T, typename Fill>
void sum_over_tokens(const SsdNoncausalParams& p, T* states, const Fill& fill) {
  const Pieces blocks{p, kBlock};
  const Chunk<S> sizes(p);
  const std::int64_t size = sizes.state_size(), count = blocks.count();
  Scratch<T> parts(count * p.nheads * size);
  parallel_for(count * p.nheads, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    Chunk<S> chunk(p);
    Scratch<T> weights(std::int64_t{kChunk} * chunk.n_step), values(std::int64_t{kChunk} * chunk.c_step);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const Place place = blocks[unit / p.nheads];
      for (std::int64_t at = 0; at < place.count; at += kChunk) {
        chunk.move_to({place.sequence, place.row + at, place.count - at < kChunk ? place.count - at : kChunk});
        const Rows<T> rows = fill(chunk, unit % p.nheads, static_cast<T*>(weights), static_cast<T*>(values));
        chunk.accumulate(parts + unit * size, at == 0, rows, values);
      }
    }
  });
  parallel_for(p.nseq * p.nheads, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t s = unit / p.nheads, head = unit % p.nheads, first = blocks.first(s);
      T* state = states + unit * size;
      for (std::int64_t i = 0; i < size; i += Vec<T>::size) {
        Vec<T> total(T(0));
        for (std::int64_t block = first; block < first + blocks.of(s); ++block)
          total += load(parts + (block * p.nheads + head) * size + i);
        store(state + i, total);
      }
    }
  });
}

// (headdim, dstate) as callers have it, from and to (n, c_step)
template <typename S, typename T>
void write_state(const Chunk<S>& sizes, T* out, const T* in) {
  for (int c = 0; c < sizes.c; ++c)
    for (int n = 0; n < sizes.n; ++n) out[c * std::int64_t{sizes.n} + n] = in[n * std::int64_t{sizes.c_step} + c];
}
template <typename S, typename T>
void add_state(const Chunk<S>& sizes, T* out, const T* in) {
  for (int n = 0; n < sizes.n; ++n)
    for (int c = 0; c < sizes.c; ++c) out[n * std::int64_t{sizes.c_step} + c] += in[c * std::int64_t{sizes.n} + n];
}

template <typename S>
void forward(const SsdNoncausalForward& p) {
  using T = acc_t<S>;
  using V = Vec<T>;
  const Chunk<S> sizes(p);
  const std::int64_t size = sizes.state_size();
  Scratch<T> states(p.nseq * p.nheads * size);
  sum_over_tokens<S>(p, static_cast<T*>(states), [&](Chunk<S>& chunk, std::int64_t head, T* weights, T* values) {
    chunk.load_steps(head);
    chunk.vectors(values, p.x, p.x_stride, head);
    for (int i = 0; i < chunk.count; ++i) {
      const V weight(chunk.dt[i] * chunk.rate);
      for (int j = 0; j < chunk.c; j += V::size) {
        T* at = values + i * std::int64_t{chunk.c_step} + j;
        store(at, weight * load(at));
      }
    }
    return chunk.rows(weights, chunk.n_step, p.B, p.B_stride, chunk.group_of(head) * chunk.n, chunk.n);
  });

  const Pieces pieces{p, kChunk};
  parallel_for(pieces.count() * p.nheads, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    Chunk<S> chunk(p);
    Scratch<T> weights(std::int64_t{kChunk} * chunk.n_step);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const Place place = pieces[unit / p.nheads];
      if (place.count == 0) continue;
      const std::int64_t head = unit % p.nheads;
      chunk.move_to(place);
      const T* state = states + (place.sequence * p.nheads + head) * size;
      const Rows<T> C = chunk.rows(weights, chunk.n_step, p.C, p.C_stride, chunk.group_of(head) * chunk.n, chunk.n);
      for_tiles<T>(chunk.count, chunk.c, [&](auto shape, int r, int col) {
        Tile<T, shape.rows, shape.vecs> tile;
        tile.clear();
        tile.add_rows(chunk.n, C.at + r * C.step, C.step, state + col, chunk.c_step);
        tile.each([&](int i, int j, V sum) {
          const std::int64_t row = chunk.row(r + i), channel = head * chunk.c + col + j;
          const int width = chunk.c - col - j;
          const V x = load_upto(static_cast<const S*>(p.x) + row * p.x_stride + channel, width);
          if (p.D) sum = fma(load_upto(static_cast<const T*>(p.D) + channel, width), x, sum);
          if (chunk.pad(r + i)) sum = V(T(0));
          store_upto(static_cast<S*>(p.y) + row * p.nheads * chunk.c + channel, sum, width);
        });
      });
    }
  });
  parallel_for(p.nseq * p.nheads, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t unit = begin; unit < end; ++unit)
      write_state(sizes, static_cast<T*>(p.state) + unit * p.headdim * p.dstate, states + unit * size);
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Gradients of one chunk and one group of heads; what belongs to parameters is left in parts, one for every chunk.
template <typename S>
class BackwardChunk {
 public:
  using T = acc_t<S>;
  using V = Vec<T>;
  static constexpr int lanes = V::size;

  BackwardChunk(const SsdNoncausalBackward& p)
      : p_(p), chunk_(p), B_(rows() * chunk_.n_step), C_(rows() * chunk_.n_step), dB_(rows() * chunk_.n_step),
        dC_(rows() * chunk_.n_step), x_(rows() * chunk_.c_step), dy_(rows() * chunk_.c_step), dots_(rows() * lanes) {}

  // state (c, n_step), dstate in both orientations, each of all heads of the sequence
  void run(const Place& place, std::int64_t group, const T* states, const T* dstates, const T* turned, T* dA, T* dbias,
           T* dD) {
    chunk_.move_to(place);
    const std::int64_t per_group = p_.nheads / p_.ngroups, n = chunk_.n, c = chunk_.c;
    const Rows<T> B = chunk_.rows(B_, chunk_.n_step, p_.B, p_.B_stride, group * n, chunk_.n);
    for (int i = 0; i < chunk_.count; ++i)
      clear_row(dB_ + i * std::int64_t{chunk_.n_step}, chunk_.n), clear_row(dC_ + i * std::int64_t{chunk_.n_step}, chunk_.n);
    for (std::int64_t i = 0; i < per_group; ++i) {
      const std::int64_t head = p_.interleaved ? i * p_.ngroups + group : group * per_group + i;
      chunk_.load_steps(head);
      chunk_.vectors(x_, p_.x, p_.x_stride, head);
      chunk_.vectors(dy_, p_.dy, p_.dy_stride, head);
      channels(head, B, dstates + head * chunk_.state_size());
      const std::int64_t size = c * chunk_.n_step;
      weights(states + head * size, turned + head * size);
      steps(head, dA + head, dbias + head);
      if (dD) skip(dD + head * c);
    }
    const std::int64_t width = p_.ngroups * n;
    for (int i = 0; i < chunk_.count; ++i)
      for (int j = 0; j < chunk_.n; j += lanes) {
        const std::int64_t at = chunk_.row(i) * width + group * n + j, from = i * std::int64_t{chunk_.n_step} + j;
        store_upto(static_cast<S*>(p_.dB) + at, load(dB_ + from), chunk_.n - j);
        store_upto(static_cast<S*>(p_.dC) + at, load(dC_ + from), chunk_.n - j);
      }
  }

 private:
  static constexpr std::int64_t rows() { return kChunk; }

  // dx = w dS B + D dy, and x . dS B in the lanes of dots_
  void channels(std::int64_t head, Rows<T> B, const T* dstate) {
    const T* D = static_cast<const T*>(p_.D);
    for (int i = 0; i < chunk_.count; ++i) store(dots_ + i * lanes, V(T(0)));
    for_tiles<T>(chunk_.count, chunk_.c, [&](auto shape, int r, int col) {
      Tile<T, shape.rows, shape.vecs> tile;
      tile.clear();
      tile.add_rows(chunk_.n, B.at + r * B.step, B.step, dstate + col, chunk_.c_step);
      tile.each([&](int i, int j, V sum) {
        const std::int64_t at = (r + i) * std::int64_t{chunk_.c_step} + col + j, channel = head * chunk_.c + col + j;
        const int width = chunk_.c - col - j;
        T* dot = dots_ + (r + i) * lanes;
        store(dot, fma(load(x_ + at), sum, load(dot)));
        sum = sum * V(chunk_.dt[r + i] * chunk_.rate);
        if (D) sum = fma(load_upto(D + channel, width), load(dy_ + at), sum);
        store_upto(static_cast<S*>(p_.dx) + chunk_.row(r + i) * p_.nheads * chunk_.c + channel, sum, width);
      });
    });
  }

  // dB += w x dS, dC += dy S
  void weights(const T* state, const T* dstate) {
    for_tiles<T>(chunk_.count, chunk_.n, [&](auto shape, int r, int col) {
      Tile<T, shape.rows, shape.vecs> tile;
      const std::int64_t from = r * std::int64_t{chunk_.c_step}, to = r * std::int64_t{chunk_.n_step} + col;
      tile.clear();
      tile.add_rows(chunk_.c, x_ + from, chunk_.c_step, dstate + col, chunk_.n_step);
      tile.each([&](int i, int j, V sum) {
        T* at = dB_ + to + i * std::int64_t{chunk_.n_step} + j;
        store(at, fma(V(chunk_.dt[r + i] * chunk_.rate), sum, load(at)));
      });
      tile.each([&](int i, int j, V& sum) { sum = load(dC_ + to + i * std::int64_t{chunk_.n_step} + j); });
      tile.add_rows(chunk_.c, dy_ + from, chunk_.c_step, state + col, chunk_.n_step);
      tile.each([&](int i, int j, V sum) { store(dC_ + to + i * std::int64_t{chunk_.n_step} + j, sum); });
    });
  }

  // ddt, and this chunk's parts of dA and ddt_bias
  void steps(std::int64_t head, T* dA, T* dbias) {
    T decay = 0, bias = 0;
    for (int i = 0; i < chunk_.count; ++i) {
      const T dw = sum(load(dots_ + i * lanes)), ddt = dw * chunk_.rate * chunk_.slope[i];
      decay -= dw * chunk_.dt[i], bias += ddt;
      from_float(static_cast<S*>(p_.ddt) + chunk_.row(i) * p_.nheads + head, ddt);
    }
    *dA = decay, *dbias = bias;
  }

  void skip(T* dD) const {
    for (int j = 0; j < chunk_.c; j += lanes) {
      V total(T(0));
      for (int i = 0; i < chunk_.count; ++i) {
        const std::int64_t at = i * std::int64_t{chunk_.c_step} + j;
        total = fma(load(dy_ + at), load(x_ + at), total);
      }
      store_upto(dD + j, total, chunk_.c - j);
    }
  }

  const SsdNoncausalBackward& p_;
  Chunk<S> chunk_;
  Scratch<T> B_, C_, dB_, dC_;  // (kChunk, n_step)
  Scratch<T> x_, dy_;           // (kChunk, c_step)
  Scratch<T> dots_;             // (kChunk, lanes)
};

// out[i] = the sum over chunks of parts (chunks, width), in their order
template <typename T>
void sum_parts(T* out, const T* parts, std::int64_t chunks, std::int64_t width) {
  for (std::int64_t i = 0; i < width; ++i) out[i] = T(0);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
    for (std::int64_t i = 0; i < width; ++i) out[i] += parts[chunk * width + i];
}

template <typename S>
void backward(const SsdNoncausalBackward& p) {
  using T = acc_t<S>;
  const Chunk<S> sizes(p);
  const std::int64_t size = sizes.state_size(), turned_size = p.headdim * sizes.n_step, given = p.headdim * p.dstate;
  const std::int64_t units = p.nseq * p.nheads;
  Scratch<T> dstates(units * size), turned(units * turned_size), states(units * turned_size);
  sum_over_tokens<S>(p, static_cast<T*>(dstates), [&](Chunk<S>& chunk, std::int64_t head, T* weights, T* values) {
    chunk.vectors(values, p.dy, p.dy_stride, head);
    return chunk.rows(weights, chunk.n_step, p.C, p.C_stride, chunk.group_of(head) * chunk.n, chunk.n);
  });
  parallel_for(units, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    const T* outer = static_cast<const T*>(p.dfinal);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      if (outer) add_state(sizes, dstates + unit * size, outer + unit * given);
      for (int c = 0; c < sizes.c; ++c) {
        T* row = turned + unit * turned_size + c * std::int64_t{sizes.n_step};
        clear_row(row, sizes.n);
        for (int n = 0; n < sizes.n; ++n) row[n] = dstates[unit * size + n * std::int64_t{sizes.c_step} + c];
        widen_row(states + unit * turned_size + c * std::int64_t{sizes.n_step},
                  static_cast<const T*>(p.state) + unit * given + c * p.dstate, sizes.n);
      }
    }
  });

  const Pieces pieces{p, kChunk};
  const std::int64_t count = pieces.count(), width = p.D ? p.nheads * p.headdim : 0;
  Scratch<T> dA(count * p.nheads), dbias(count * p.nheads), dD(count * width);
  parallel_for(count * p.ngroups, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    BackwardChunk<S> chunk(p);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t piece = unit / p.ngroups, first = pieces[piece].sequence * p.nheads;
      // a piece without tokens leaves zeros
      chunk.run(pieces[piece], unit % p.ngroups, states + first * turned_size, dstates + first * size,
                turned + first * turned_size, dA + piece * p.nheads, dbias + piece * p.nheads,
                p.D ? dD + piece * width : nullptr);
    }
  });
  sum_parts(static_cast<T*>(p.dA), static_cast<const T*>(dA), count, p.nheads);
  if (p.dt_bias) sum_parts(static_cast<T*>(p.ddt_bias), static_cast<const T*>(dbias), count, p.nheads);
  if (p.D) sum_parts(static_cast<T*>(p.dD), static_cast<const T*>(dD), count, width);
}

}  // namespace

void ssd_noncausal_forward(const SsdNoncausalForward& p) {
  switch (p.dtype) {
    case DType::float64: return forward<double>(p);
    case DType::bfloat16: return forward<bfloat16>(p);
    case DType::float16: return forward<float16>(p);
    default: return forward<float>(p);
  }
}

void ssd_noncausal_backward(const SsdNoncausalBackward& p) {
  switch (p.dtype) {
    case DType::float64: return backward<double>(p);
    case DType::bfloat16: return backward<bfloat16>(p);
    case DType::float16: return backward<float16>(p);
    default: return backward<float>(p);
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
