// Channels in lanes, tokens innermost. A chunk of the walk is cut at its restarts into pieces; a piece lists the rows of
// its tokens and of the width-1 tokens before them, which may be entries of the initial state or zeros. So a tap is one
// load whatever the walk, and the kernels never ask where a token came from.
//
// Backward recomputes the activation's slope, also for the width-1 tokens after a piece, whose gradients reach into it:
// pieces do not wait for each other. Gradients of the parameters are summed per part, a run of chunks that depends on
// the shape alone, and the parts are added in order.
#include "cpu/causal_conv1d.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/walk.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

constexpr int kVecs = 2;  // vectors of channels walked together

// ---- access to whole vectors of channels, or to the last ones ------------------------------------------------------

struct Whole {
  template <typename E> SSMKIT_INLINE Vec<acc_t<E>> get(const E* p) const { return load(p); }
  template <typename E> SSMKIT_INLINE void put(E* p, Vec<acc_t<E>> v) const { store(p, v); }
};
struct Some {
  int count;
  template <typename E> SSMKIT_INLINE Vec<acc_t<E>> get(const E* p) const { return load(p, count); }
  template <typename E> SSMKIT_INLINE void put(E* p, Vec<acc_t<E>> v) const { store(p, v, count); }
};

// 1 / (1 + e^-v); e^-v is kept finite, so that e^-v times the result is the complement.
template <typename T>
SSMKIT_INLINE Logistic<T> logistic_of(Vec<T> v) {
  constexpr T kLargest = sizeof(T) == 4 ? T(126) : T(1022);
  const Vec<T> e = exp2(min(v * Vec<T>(-kLog2e<T>), Vec<T>(kLargest)));
  const Vec<T> s = Vec<T>(T(1)) / (Vec<T>(T(1)) + e);
  return {s, e * s};
}

// ---- pieces of the walk ---------------------------------------------------------------------------------------------

template <typename In>
struct Piece {
  const In** x;       // window + count + ahead rows: of the tokens before, of the tokens, of those after
  std::int64_t* row;  // count + ahead: the tokens
  int count, ahead;
  std::int64_t sequence;
  bool entries;  // the window is the initial state itself
  bool to_end;   // after the last token listed the sequence ends
};

template <typename In>
class Pieces {
 public:
  explicit Pieces(const CausalConv1dParams& p)
      : p_(p), walk_{p.seqlen, p.cu_seqlens, p.order, p.flags, p.reverse}, window_(static_cast<int>(p.width - 1)),
        x_(kChunk + 2 * window_), row_(kChunk + window_), zeros_(p.dim) {
    std::memset(zeros_, 0, static_cast<std::size_t>(p.dim) * sizeof(In));
  }

  // f(piece) for the pieces of one chunk, g(row) for its pads.
  template <typename F, typename G>
  void chunk(std::int64_t s, std::int64_t k, bool with_ahead, const F& f, const G& g) {
    const Sequence sequence = walk_.sequence(s);
    chunk_.fill(walk_, sequence, k);
    for (int i = 0; i < chunk_.npads; ++i) g(chunk_.pad[i]);
    for (int r = 0; r < chunk_.nruns; ++r) {
      const Run run = chunk_.run[r];
      Piece<In> piece{x_, row_, run.end - run.begin, 0, s, k == 0 && r == 0 && !run.restart, false};
      if (piece.count == 0 && !(with_ahead && piece.entries)) continue;
      fill_window(sequence, s, run.restart ? -1 : k * kChunk);
      for (int i = 0; i < piece.count; ++i) {
        row_[i] = chunk_.row[run.begin + i];
        x_[window_ + i] = at(row_[i]);
      }
      if (with_ahead && r == chunk_.nruns - 1) look_ahead(sequence, (k + 1) * kChunk, piece);
      f(piece);
    }
  }

  // The final state of a sequence.
  void final_state(std::int64_t s, In* out) {
    const Sequence sequence = walk_.sequence(s);
    fill_window(sequence, s, sequence.length);
    for (int i = 0; i < window_; ++i) std::memcpy(out + i * p_.dim, x_[i], static_cast<std::size_t>(p_.dim) * sizeof(In));
  }

  Sequence sequence(std::int64_t s) const { return walk_.sequence(s); }

 private:
  const In* at(std::int64_t row) const { return static_cast<const In*>(p_.x) + row * p_.x_stride; }
  std::uint8_t flag(std::int64_t row) const { return p_.flags ? p_.flags[row] : 0; }

  // The window before a position; -1 stands for one after a restart.
  void fill_window(const Sequence& sequence, std::int64_t s, std::int64_t position) {
    int i = window_ - 1;
    bool cut = position < 0;
    while (i >= 0 && position > 0 && !cut) {
      const std::int64_t row = walk_.row(sequence, --position);
      if (!(flag(row) & kPad)) x_[i--] = at(row);
      cut = flag(row) & kRestart;
    }
    const bool stateful = !cut && p_.initial_state;
    const In* entry = static_cast<const In*>(p_.initial_state) + (stateful ? (s + 1) * window_ * p_.dim : 0);
    for (; i >= 0; --i) x_[i] = stateful ? (entry -= p_.dim) : zeros_;
  }

  void look_ahead(const Sequence& sequence, std::int64_t position, Piece<In>& piece) {
    bool cut = false;
    for (; position < sequence.length && piece.ahead < window_ && !cut; ++position) {
      const std::int64_t row = walk_.row(sequence, position);
      cut = flag(row) & kRestart;
      if (cut || flag(row) & kPad) continue;
      row_[piece.count + piece.ahead] = row;
      x_[window_ + piece.count + piece.ahead++] = at(row);
    }
    piece.to_end = !cut && position >= sequence.length;
  }

  const CausalConv1dParams& p_;
  Walk walk_;
  int window_;
  Chunk chunk_;
  Scratch<const In*> x_;
  Scratch<std::int64_t> row_;
  Scratch<In> zeros_;
};

// ---- work: parts of the chunks times ranges of channels ------------------------------------------------------------

struct Work {
  std::int64_t slots;  // of chunks; with packed sequences some are empty
  std::int64_t parts, splits;

  template <typename T>
  static Work of(const CausalConv1dParams& p, T) {
    Work work;
    work.slots = p.cu_seqlens ? p.seqlen / kChunk + p.nseq : p.nseq * ((p.seqlen + kChunk - 1) / kChunk);
    work.parts = work.slots / 4 < 1 ? 1 : work.slots / 4 > 64 ? 64 : work.slots / 4;
    const std::int64_t blocks = (p.dim + kVecs * Vec<T>::size - 1) / (kVecs * Vec<T>::size);
    const std::int64_t wanted = p.threads > 1 ? (4 * p.threads + work.parts - 1) / work.parts : 1;
    work.splits = wanted < blocks ? wanted : blocks;
    return work;
  }

  // body(part, first channel, last channel) on all threads.
  template <typename T, typename Body>
  void run(const CausalConv1dParams& p, T, const Body& body) const {
    constexpr int step = kVecs * Vec<T>::size;
    const std::int64_t blocks = (p.dim + step - 1) / step;
    parallel_for(parts * splits, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t split = item % splits, last = blocks * (split + 1) / splits * step;
        body(item / splits, blocks * split / splits * step, last < p.dim ? last : p.dim);
      }
    });
  }

  // f(sequence, chunk, whether it is the first slot of its sequence) for the slots of a part.
  template <typename F>
  void for_slots(const CausalConv1dParams& p, std::int64_t part, const F& f) const {
    const Walk walk{p.seqlen, p.cu_seqlens, nullptr, nullptr, false};
    const std::int64_t begin = slots * part / parts, end = slots * (part + 1) / parts;
    std::int64_t s = 0;
    for (std::int64_t low = 0, high = p.nseq; low < high;) {  // the last sequence that starts at or before `begin`
      const std::int64_t middle = (low + high) / 2;
      if (walk.sequence(middle).slot <= begin) s = middle, low = middle + 1;
      else high = middle;
    }
    for (std::int64_t slot = begin; slot < end; ++slot) {
      while (s + 1 < p.nseq && walk.sequence(s + 1).slot <= slot) ++s;
      f(s, slot - walk.sequence(s).slot);
    }
  }
};

// ---- kernels over one piece and one block of channels --------------------------------------------------------------

// The taps of a block: in registers when the width is known.
template <typename T, int kWidth, int kCount, typename Access>
struct Taps {
  const T* from;  // (width, dim), at the block's first channel
  std::int64_t dim;
  Access access;
  Vec<T> held[kWidth > 0 ? kWidth : 1][kCount];

  SSMKIT_INLINE Taps(const T* from, std::int64_t dim, Access access) : from(from), dim(dim), access(access) {
    for (int j = 0; j < kWidth; ++j)
      for (int v = 0; v < kCount; ++v) held[j][v] = access.get(from + j * dim + v * Vec<T>::size);
  }
  SSMKIT_INLINE Vec<T> operator()(std::int64_t j, int v) const {
    if constexpr (kWidth > 0) return held[j][v];
    else return access.get(from + j * dim + v * Vec<T>::size);
  }
};

// The rows under the taps of one token after the other. Half precision keeps them, since widening costs more than moving.
template <typename In, int kWidth, int kCount, typename Access>
struct Window {
  using T = acc_t<In>;
  static constexpr bool kKept = sizeof(In) == 2;

  const In* const* rows;
  std::int64_t c;
  Access access;
  Vec<T> x[kWidth][kCount];

  SSMKIT_INLINE Window(const In* const* rows, std::int64_t c, Access access) : rows(rows), c(c), access(access) {
    if constexpr (kKept)
      for (int j = 1; j < kWidth; ++j) read(j, j - 1);
  }
  SSMKIT_INLINE void move_to(int i) {
    if constexpr (kKept) {
      for (int j = 1; j < kWidth; ++j)
        for (int v = 0; v < kCount; ++v) x[j - 1][v] = x[j][v];
      read(kWidth - 1, i + kWidth - 1);
    } else {
      for (int j = 0; j < kWidth; ++j) read(j, i + j);
    }
  }

 private:
  SSMKIT_INLINE void read(int j, int row) {
    for (int v = 0; v < kCount; ++v) x[j][v] = access.get(rows[row] + c + v * Vec<T>::size);
  }
};
// Of a width known at run time only, nothing is held.
template <typename In, int kCount, typename Access>
struct Window<In, 0, kCount, Access> {
  using T = acc_t<In>;
  SSMKIT_INLINE Window(const In* const*, std::int64_t, Access) {}
  SSMKIT_INLINE void move_to(int) {}
};

// The width where it is known, else `width`.
template <int kWidth>
SSMKIT_INLINE std::int64_t known(std::int64_t width) {
  return kWidth > 0 ? kWidth : width;
}

// What lies under tap j of token i, vector v of the block.
template <int kWidth, typename In, typename Held, typename Access>
SSMKIT_INLINE auto tap(const Held& held, const Piece<In>& piece, int i, int j, int v, std::int64_t c, Access access) {
  if constexpr (kWidth > 0) return held.x[j][v];
  else return access.get(piece.x[i + j] + c + v * Vec<acc_t<In>>::size);
}

// Ask for the cache lines of the next block of `kStep` channels: rows lie too far apart for the hardware to guess.
template <int kStep, int kWrite = 0, typename In>
SSMKIT_INLINE void fetch(const In* row) {
  for (int byte = 0; byte < kStep * static_cast<int>(sizeof(In)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row + kStep) + byte, kWrite);
}

// taps: (width, dim), the weight with the oldest token first. c: the block's first channel.
template <typename In, int kWidth, int kCount, typename Access>
void forward_block(const CausalConv1dForward& p, const acc_t<In>* taps, const Piece<In>& piece, std::int64_t c,
                   Access access) {
  using T = acc_t<In>;
  constexpr int V = Vec<T>::size;
  const std::int64_t width = known<kWidth>(p.width), dim = p.dim;
  const bool silu = p.silu;
  In* y = static_cast<In*>(p.y) + c;
  const Taps<T, kWidth, kCount, Access> w(taps + c, dim, access);
  Vec<T> bias[kCount];
  for (int v = 0; v < kCount; ++v)
    bias[v] = p.bias ? access.get(static_cast<const T*>(p.bias) + c + v * V) : Vec<T>(T(0));
  Window<In, kWidth, kCount, Access> window(piece.x, c, access);
  for (int i = 0; i < piece.count; ++i) {
    window.move_to(i);
    fetch<kCount * V>(piece.x[i + width - 1] + c);
    Vec<T> sum[kCount];
    for (int v = 0; v < kCount; ++v) sum[v] = bias[v];
    for (int j = 0; j < width; ++j)
      for (int v = 0; v < kCount; ++v) sum[v] = fma(w(j, v), tap<kWidth>(window, piece, i, j, v, c, access), sum[v]);
    In* out = y + piece.row[i] * dim;
    fetch<kCount * V, 1>(out);
    for (int v = 0; v < kCount; ++v) access.put(out + v * V, silu ? sum[v] * logistic_of(sum[v]).s : sum[v]);
  }
}

// g (window + count + ahead + window, kCount * V) gets the gradients before the activation, zeros around them; those of
// the parameters are added to dparameter (width + 1, dim), the last row the bias.
template <typename In, int kWidth, int kCount, typename Access>
SSMKIT_INLINE void gradients(const CausalConv1dBackward& p, const acc_t<In>* taps, const Piece<In>& piece,
                             std::int64_t c, Access access, acc_t<In>* g, acc_t<In>* dparameter) {
  using T = acc_t<In>;
  constexpr int V = Vec<T>::size, kHeld = kWidth > 0 ? kWidth : 1;
  const std::int64_t width = known<kWidth>(p.width), dim = p.dim, before = width - 1;
  const int tokens = piece.count + piece.ahead;
  const bool silu = p.silu;
  const auto margin = static_cast<std::size_t>(before * kCount * V) * sizeof(T);
  std::memset(g, 0, margin);
  std::memset(g + (before + tokens) * kCount * V, 0, margin);
  const Taps<T, kWidth, kCount, Access> w(taps + c, dim, access);
  Vec<T> bias[kCount], db[kCount], dw[kHeld][kCount];
  for (int v = 0; v < kCount; ++v) {
    bias[v] = p.bias ? access.get(static_cast<const T*>(p.bias) + c + v * V) : Vec<T>(T(0));
    db[v] = Vec<T>(T(0));
    for (int j = 0; j < kHeld; ++j) dw[j][v] = Vec<T>(T(0));
  }

  Window<In, kWidth, kCount, Access> window(piece.x, c, access);
  for (int i = 0; i < tokens; ++i) {
    const In* dy = static_cast<const In*>(p.dy) + piece.row[i] * p.dy_stride + c;
    window.move_to(i);
    Vec<T> slope[kCount];
    for (int v = 0; v < kCount; ++v) slope[v] = access.get(dy + v * V);
    if (silu) {
      Vec<T> sum[kCount];
      for (int v = 0; v < kCount; ++v) sum[v] = bias[v];
      for (int j = 0; j < width; ++j)
        for (int v = 0; v < kCount; ++v) sum[v] = fma(w(j, v), tap<kWidth>(window, piece, i, j, v, c, access), sum[v]);
      for (int v = 0; v < kCount; ++v) {
        const Logistic<T> l = logistic_of(sum[v]);
        slope[v] = slope[v] * l.s * fma(sum[v], l.rest, Vec<T>(T(1)));
      }
    }
    for (int v = 0; v < kCount; ++v) store(g + ((before + i) * kCount + v) * V, slope[v]);
    if (i >= piece.count) continue;
    for (int v = 0; v < kCount; ++v) db[v] += slope[v];
    for (int j = 0; j < width; ++j)
      for (int v = 0; v < kCount; ++v) {
        const Vec<T> x = tap<kWidth>(window, piece, i, j, v, c, access);
        if constexpr (kWidth > 0) {
          dw[j][v] = fma(slope[v], x, dw[j][v]);
        } else {
          T* sum = dparameter + j * dim + c + v * V;
          access.put(sum, fma(slope[v], x, access.get(sum)));
        }
      }
  }

  for (int v = 0; v < kCount; ++v) {
    T* sum = dparameter + c + v * V;
    for (int j = 0; j < kWidth; ++j) access.put(sum + j * dim, access.get(sum + j * dim) + dw[j][v]);
    access.put(sum + width * dim, access.get(sum + width * dim) + db[v]);
  }
}

// dx of a piece, and of the initial state before it, from g.
template <typename In, int kWidth, int kCount, typename Access>
SSMKIT_INLINE void inputs(const CausalConv1dBackward& p, const acc_t<In>* taps, const Piece<In>& piece, std::int64_t c,
                          Access access, const acc_t<In>* g) {
  using T = acc_t<In>;
  constexpr int V = Vec<T>::size;
  const std::int64_t width = known<kWidth>(p.width), dim = p.dim, window = width - 1;
  const Taps<T, kWidth, kCount, Access> w(taps + c, dim, access);
  // the entry of the final state that token i of the piece is, where it is 0 or more
  const std::int64_t shift = window - piece.count - piece.ahead;
  const In* dfinal = piece.to_end ? static_cast<const In*>(p.dfinal_state) : nullptr;
  const std::int64_t state = piece.sequence * window;
  for (std::int64_t i = piece.entries && p.dinitial_state ? -window : 0; i < piece.count; ++i) {
    Vec<T> sum[kCount];
    for (int v = 0; v < kCount; ++v) sum[v] = Vec<T>(T(0));
    for (int k = 0; k < width; ++k)
      for (int v = 0; v < kCount; ++v)
        sum[v] = fma(w(width - 1 - k, v), load(g + ((window + i + k) * kCount + v) * V), sum[v]);
    if (dfinal && i + shift >= 0)
      for (int v = 0; v < kCount; ++v) sum[v] += access.get(dfinal + (state + i + shift) * dim + c + v * V);
    In* out = i >= 0 ? static_cast<In*>(p.dx) + piece.row[i] * dim
                     : static_cast<In*>(p.dinitial_state) + (state + window + i) * dim;
    for (int v = 0; v < kCount; ++v) access.put(out + c + v * V, sum[v]);
  }
}

template <typename In, int kWidth, int kCount, typename Access>
void backward_block(const CausalConv1dBackward& p, const acc_t<In>* taps, const Piece<In>& piece, std::int64_t c,
                    Access access, acc_t<In>* g, acc_t<In>* dparameter) {
  gradients<In, kWidth, kCount>(p, taps, piece, c, access, g, dparameter);
  inputs<In, kWidth, kCount>(p, taps, piece, c, access, g);
}

// ---- whole calls ----------------------------------------------------------------------------------------------------

// Too small a call is faster on one thread: 16384 elements take about as long as waking another.
template <typename Params>
Params with_threads(Params p) {
  const std::int64_t useful = 1 + p.batch * p.seqlen * p.dim / 16384;
  if (p.threads > useful) p.threads = static_cast<int>(useful);
  return p;
}

template <typename T>
void transpose(T* out, const T* in, std::int64_t rows, std::int64_t cols) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < cols; ++c) out[c * rows + r] = in[r * cols + c];
}

// The kernel of kVecs whole vectors, by width.
template <typename In>
auto forward_blocks(std::int64_t width) {
  switch (width) {
    case 2: return &forward_block<In, 2, kVecs, Whole>;
    case 3: return &forward_block<In, 3, kVecs, Whole>;
    case 4: return &forward_block<In, 4, kVecs, Whole>;
    default: return &forward_block<In, 0, kVecs, Whole>;
  }
}
template <typename In>
auto backward_blocks(std::int64_t width) {
  switch (width) {
    case 2: return &backward_block<In, 2, kVecs, Whole>;
    case 3: return &backward_block<In, 3, kVecs, Whole>;
    case 4: return &backward_block<In, 4, kVecs, Whole>;
    default: return &backward_block<In, 0, kVecs, Whole>;
  }
}

// whole(first channel) for blocks of kVecs vectors, some(first channel, access) for what is left, at most a vector each.
template <typename T, typename F, typename G>
SSMKIT_INLINE void for_blocks(std::int64_t begin, std::int64_t end, const F& whole, const G& some) {
  constexpr int V = Vec<T>::size;
  std::int64_t c = begin;
  for (; c + kVecs * V <= end; c += kVecs * V) whole(c);
  for (; c < end; c += V) some(c, Some{static_cast<int>(end - c < V ? end - c : V)});
}

template <typename In>
void forward(const CausalConv1dForward& p) {
  using T = acc_t<In>;
  const auto block = forward_blocks<In>(p.width);
  Scratch<T> taps(p.width * p.dim);
  transpose<T>(taps, static_cast<const T*>(p.weight), p.dim, p.width);
  const Work work = Work::of(p, T());
  In* y = static_cast<In*>(p.y);
  work.run(p, T(), [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
    Pieces<In> pieces(p);
    work.for_slots(p, part, [&](std::int64_t s, std::int64_t k) {
      if (k == 0 && begin == 0) pieces.final_state(s, static_cast<In*>(p.final_state) + s * (p.width - 1) * p.dim);
      if (k >= pieces.sequence(s).chunks()) return;
      pieces.chunk(
          s, k, false,
          [&](const Piece<In>& piece) {
            for_blocks<T>(
                begin, end, [&](std::int64_t c) { block(p, taps, piece, c, Whole()); },
                [&](std::int64_t c, Some some) { forward_block<In, 0, 1>(p, taps, piece, c, some); });
          },
          [&](std::int64_t row) {
            std::memset(y + row * p.dim + begin, 0, static_cast<std::size_t>(end - begin) * sizeof(In));
          });
    });
  });
}

template <typename In>
void backward(const CausalConv1dBackward& p) {
  using T = acc_t<In>;
  constexpr int V = Vec<T>::size;
  const auto block = backward_blocks<In>(p.width);
  const std::int64_t window = p.width - 1, rows = p.width + 1;
  Scratch<T> taps(p.width * p.dim);
  transpose<T>(taps, static_cast<const T*>(p.weight), p.dim, p.width);
  const Work work = Work::of(p, T());
  Scratch<T> parts(work.parts * rows * p.dim);
  In* dx = static_cast<In*>(p.dx);
  In* dinitial = static_cast<In*>(p.dinitial_state);
  work.run(p, T(), [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
    Pieces<In> pieces(p);
    Scratch<T> g((kChunk + 3 * window) * kVecs * V);
    const auto bytes = static_cast<std::size_t>(end - begin) * sizeof(In);
    T* dparameter = parts + part * rows * p.dim;
    for (std::int64_t j = 0; j < rows; ++j)
      for (std::int64_t c = begin; c < end; ++c) dparameter[j * p.dim + c] = T(0);
    work.for_slots(p, part, [&](std::int64_t s, std::int64_t k) {
      if (k == 0 && dinitial)  // what no piece writes: an empty sequence, or a restart before its first token
        for (std::int64_t i = s * window; i < (s + 1) * window; ++i) {
          In* out = dinitial + i * p.dim + begin;
          if (pieces.sequence(s).length == 0 && p.dfinal_state)
            std::memcpy(out, static_cast<const In*>(p.dfinal_state) + i * p.dim + begin, bytes);
          else
            std::memset(out, 0, bytes);
        }
      if (k >= pieces.sequence(s).chunks()) return;
      pieces.chunk(
          s, k, true,
          [&](const Piece<In>& piece) {
            for_blocks<T>(
                begin, end, [&](std::int64_t c) { block(p, taps, piece, c, Whole(), g, dparameter); },
                [&](std::int64_t c, Some some) { backward_block<In, 0, 1>(p, taps, piece, c, some, g, dparameter); });
          },
          [&](std::int64_t row) { std::memset(dx + row * p.dim + begin, 0, bytes); });
    });
  });

  T* dweight = static_cast<T*>(p.dweight);
  T* dbias = static_cast<T*>(p.dbias);
  for (std::int64_t j = 0; j < rows; ++j) {
    if (j == p.width && !dbias) continue;
    for (std::int64_t c = 0; c < p.dim; ++c) {
      T sum = T(0);
      for (std::int64_t part = 0; part < work.parts; ++part) sum += parts[(part * rows + j) * p.dim + c];
      (j < p.width ? dweight[c * p.width + j] : dbias[c]) = sum;
    }
  }
}

}  // namespace

void causal_conv1d_forward(const CausalConv1dForward& p) {
  switch (p.dtype) {
    case DType::float32: return forward<float>(with_threads(p));
    case DType::float64: return forward<double>(with_threads(p));
    case DType::bfloat16: return forward<bfloat16>(with_threads(p));
    default: return forward<float16>(with_threads(p));
  }
}

void causal_conv1d_backward(const CausalConv1dBackward& p) {
  switch (p.dtype) {
    case DType::float32: return backward<float>(with_threads(p));
    case DType::float64: return backward<double>(with_threads(p));
    case DType::bfloat16: return backward<bfloat16>(with_threads(p));
    default: return backward<float16>(with_threads(p));
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
