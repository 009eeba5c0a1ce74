// Backward. Tiles are visited from the last to the first. The states of a tile are recomputed from its upper and its left
// border, kStates of them at a time, and kept with their decays; then its cells are walked backwards with the adjoint g:
//
//     g_ij = w (C_ij dy_ij + a_top,i+1,j g_i+1,j + a_left,i,j+1 g_i,j+1)         dC = sum_d dy h
//     q_top = g a_top h_{i-1,j}         dA_top = sum_ij dt_top q_top             dB_top = sum_d dt_top x g
//     ddt_top = x sum_n g B_top + sum_n q_top A_top                              and the same for left
//     dx = dt_top sum_n g B_top + dt_left sum_n g B_left + D dy
//
// What several units add to (dB, dC over channels, dA, dD, ddt_bias over cells) is stored apart and added in order at
// the end: the result depends on sizes, not on which thread came first.
#include "cpu/grid_scan.h"

#include "cpu/grid_scan_plan.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kStates = 4;
#else
constexpr int kStates = 2;
#endif

constexpr int kRow = kTile + 1;           // a tile's row of states and the one to its left
constexpr int kStateCells = kRow * kRow;  // with the row above
constexpr int kLine = kCells + 16;        // from one state's weights to the next: a line more than a power of two

// The sums to be finished at the end. Cells are counted in the order of the scan here, not in that of memory.
template <typename T>
struct Sums {
  T* weights;     // dB_top, dB_left, dC: (3, parts, dstate, batch height width)
  T* parameters;  // (groups, tile rows, 2 dstate + 3, dim): dA_top, dA_left, dD, ddt_top_bias, ddt_left_bias
};

// The numbers of a tile: without a state [cell][lane], weights [state][cell], states and decays of kCount states at a time
// [cell][state][lane].
template <typename T>
struct Cells {
  const T *dt[2], *dtx[2], *dy;  // dt log2(e), dt x, dy (through the gate)
  T *gB[2], *qA[2], *y;          // sum_n g B, sum_n q A, sum_n C h (only with a gate)
  const T *B[2], *C;
  T *h, *a[2];                   // h with a row above and a column to the left
};

template <typename T, int kCount, bool kGated>
void recompute(const Window& w, const Cells<T>& cells, const T* A_top, const T* A_left) {
  constexpr int V = Vec<T>::size;
  for (int i = 0; i < w.height; ++i) {
    T* h_at = cells.h + ((i + 1) * kRow + 1) * kCount * V;
    Vec<T> h[kCount];
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) h[n] = load(h_at - (kCount - n) * V);
    for (int j = 0; j < w.width; ++j, h_at += kCount * V) {
      const int t = i * w.width + j;
      const Vec<T> dt_top = load(cells.dt[kTop] + t * V), dt_left = load(cells.dt[kLeft] + t * V);
      const Vec<T> dtx_top = load(cells.dtx[kTop] + t * V), dtx_left = load(cells.dtx[kLeft] + t * V);
      const Vec<T> weight = weight_of<T>(w.i + i, w.j + j);
      const T* above = h_at - kRow * kCount * V;
      Vec<T> y;
      if constexpr (kGated) y = load(cells.y + t * V);
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) {
        const Vec<T> a_top = exp2(load(A_top + n * V) * dt_top), a_left = exp2(load(A_left + n * V) * dt_left);
        const Vec<T> B_top(cells.B[kTop][n * kLine + t]), B_left(cells.B[kLeft][n * kLine + t]);
        const Vec<T> b = fma(dtx_top, B_top, dtx_left * B_left);
        h[n] = weight * fma(a_left, h[n], fma(a_top, load(above + n * V), b));
        store(h_at + n * V, h[n]);
        store(cells.a[kTop] + (t * kCount + n) * V, a_top);
        store(cells.a[kLeft] + (t * kCount + n) * V, a_left);
        if constexpr (kGated) y = fma(Vec<T>(cells.C[n * kLine + t]), h[n], y);
      }
      if constexpr (kGated) store(cells.y + t * V, y);
    }
  }
}

// What the adjoint walk carries: g a of the cells below [column][state][lane] and to the right [row][state][lane], of
// which each has `pitch` numbers; the sums of dA; and the terms of dB_top, dB_left and dC of a row of cells,
// [which][state][column][lane], which `reduce(i)` adds over lanes.
template <typename T>
struct Adjoint {
  T *below, *right;
  std::int64_t pitch;
  T* dA[2];
  T* row;
};

template <typename T, int kCount, typename Reduce>
void adjoint(const Window& w, const Cells<T>& cells, const T* A_top, const T* A_left, const Adjoint<T>& to,
             const Reduce& reduce) {
  constexpr int V = Vec<T>::size;
  constexpr std::int64_t kOneState = kTile * V, kOneWeight = kCount * kOneState;
  Vec<T> dA_top[kCount], dA_left[kCount];
#pragma GCC unroll 4
  for (int n = 0; n < kCount; ++n) dA_top[n] = load(to.dA[kTop] + n * V), dA_left[n] = load(to.dA[kLeft] + n * V);
  for (int i = w.height - 1; i >= 0; --i) {
    const T* h_at = cells.h + ((i + 1) * kRow + w.width) * kCount * V;
    Vec<T> right[kCount];
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) right[n] = load(to.right + i * to.pitch + n * V);
    for (int j = w.width - 1; j >= 0; --j, h_at -= kCount * V) {
      const int t = i * w.width + j;
      const Vec<T> dt_top = load(cells.dt[kTop] + t * V), dt_left = load(cells.dt[kLeft] + t * V);
      const Vec<T> dtx_top = load(cells.dtx[kTop] + t * V), dtx_left = load(cells.dtx[kLeft] + t * V);
      const Vec<T> dy = load(cells.dy + t * V), weight = weight_of<T>(w.i + i, w.j + j);
      const T *a_top = cells.a[kTop] + t * kCount * V, *a_left = cells.a[kLeft] + t * kCount * V;
      T *below = to.below + j * to.pitch, *row = to.row + j * V;
      Vec<T> gB_top = load(cells.gB[kTop] + t * V), gB_left = load(cells.gB[kLeft] + t * V);
      Vec<T> qA_top = load(cells.qA[kTop] + t * V), qA_left = load(cells.qA[kLeft] + t * V);
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) {
        const int at = n * kLine + t;
        const Vec<T> g = weight * fma(Vec<T>(cells.C[at]), dy, load(below + n * V) + right[n]);
        store(row + n * kOneState, dtx_top * g);
        store(row + n * kOneState + kOneWeight, dtx_left * g);
        store(row + n * kOneState + 2 * kOneWeight, dy * load(h_at + n * V));
        gB_top = fma(g, Vec<T>(cells.B[kTop][at]), gB_top);
        gB_left = fma(g, Vec<T>(cells.B[kLeft][at]), gB_left);
        const Vec<T> up = g * load(a_top + n * V);
        store(below + n * V, up);
        right[n] = g * load(a_left + n * V);
        const Vec<T> q_top = up * load(h_at + (n - kRow * kCount) * V);
        const Vec<T> q_left = right[n] * load(h_at + (n - kCount) * V);
        qA_top = fma(q_top, load(A_top + n * V), qA_top);
        qA_left = fma(q_left, load(A_left + n * V), qA_left);
        dA_top[n] = fma(q_top, dt_top, dA_top[n]);
        dA_left[n] = fma(q_left, dt_left, dA_left[n]);
      }
      store(cells.gB[kTop] + t * V, gB_top), store(cells.gB[kLeft] + t * V, gB_left);
      store(cells.qA[kTop] + t * V, qA_top), store(cells.qA[kLeft] + t * V, qA_left);
    }
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) store(to.right + i * to.pitch + n * V, right[n]);
    reduce(i);
  }
#pragma GCC unroll 4
  for (int n = 0; n < kCount; ++n) store(to.dA[kTop] + n * V, dA_top[n]), store(to.dA[kLeft] + n * V, dA_left[n]);
}

template <typename In>
class BackwardPart {
  using T = acc_t<In>;
  static constexpr int V = Vec<T>::size, kPitch = kPitchOf<T>;

 public:
  BackwardPart(const GridScanBackward& p, const Channels& channels, const Borders<const T>& states,
               const Borders<T>& adjoints, const Sums<T>& sums, std::int64_t part)
      : p_(p), channels_(channels), states_(states), adjoints_(adjoints), sums_(sums), part_(part), grid_(p),
        parameters_(p, channels, part), weights_(3 * kLine * p.dstate), row_(p.dstate),
        carried_((2 * kTile + 2) * p.dstate * V), vectors_(3 * V), buffers_(kBuffers * kPitch),
        kept_(kStates * (kStateCells * V + 2 * kPitch)), terms_(3 * kStates * kTile * V) {
    fill<T>(terms_, 3 * kStates * kTile * V, T(0));
  }

  void operator()(const Window& w, std::int64_t group) {
    grid_.tokens(w, token_);
    for (int t = 0; t < w.cells(); ++t)
      for (int i = 0; i < 3; ++i) {
        const In* from = static_cast<const In*>(i < 2 ? p_.B[i] : p_.C);
        widen<In>(row_, from + token_[t] * (i < 2 ? p_.B_stride[i] : p_.C_stride), p_.dstate);
        for (std::int64_t n = 0; n < p_.dstate; ++n) weights_[(i * p_.dstate + n) * kLine + t] = row_[n];
      }
    for (int b = 0; b < channels_.count(part_); ++b) {
      const Block block = channels_.block(part_, b);
      prologue(w, b, block);
      enter(w, block);
      std::int64_t n = 0;
      for (; n + kStates <= p_.dstate; n += kStates) states<kStates>(w, b, block, n);
      for (; n < p_.dstate; ++n) states<1>(w, b, block, n);
      leave(w, block);
      epilogue(w, b, block);
      contribute(block, group * grid_.rows() + w.row);
    }
  }

 private:
  enum Buffer { kDt, kDtx = 2, kSlope = 4, kGB = 6, kQA = 8, kDy = 10, kX, kDyOut, kY, kBuffers };
  enum Vector { kDD, kDBias };
  T* buffer(int which) const { return buffers_ + which * kPitch; }
  T* below() const { return carried_; }
  T* right() const { return carried_ + kTile * p_.dstate * V; }
  T* dA(int side) const { return carried_ + (2 * kTile + side) * p_.dstate * V; }

  void prologue(const Window& w, int b, const Block& block) {
    const Vec<T> D = parameters_.D(b), zero(T(0)), one(T(1)), log2e(kLog2e<T>);
    const In *x_in = static_cast<const In*>(p_.x) + block.channel, *dy_in = static_cast<const In*>(p_.dy) + block.channel;
    const In* z_in = static_cast<const In*>(p_.z) + block.channel;
    const bool last = b + 1 == channels_.count(part_);
    const std::int64_t ahead = last ? grid_.to_next(w, true) : 0;
    const std::int64_t channel = channels_.block(part_, last ? 0 : b + 1).channel;
    for (int t = 0; t < w.cells(); ++t) {
      // as in the forward pass
      const std::int64_t row = token_[t], next = row + ahead;
      __builtin_prefetch(static_cast<const In*>(p_.x) + next * p_.x_stride + channel, 0, 2);
      __builtin_prefetch(static_cast<const In*>(p_.dy) + next * p_.dy_stride + channel, 0, 2);
      __builtin_prefetch(static_cast<const In*>(p_.dx) + next * p_.dim + channel, 1, 2);
      if (p_.z) __builtin_prefetch(static_cast<const In*>(p_.z) + next * p_.z_stride + channel, 0, 2);
      for (const Side side : kSides) {
        __builtin_prefetch(static_cast<const In*>(p_.dt[side]) + next * p_.dt_stride[side] + channel, 0, 2);
        __builtin_prefetch(static_cast<const In*>(p_.ddt[side]) + next * p_.dim + channel, 1, 2);
      }
      const Vec<T> x = load_lanes(x_in + row * p_.x_stride, block.lanes);
      Vec<T> dy = load_lanes(dy_in + row * p_.dy_stride, block.lanes);
      if (p_.z) {
        store(buffer(kDyOut) + t * V, dy);
        store(buffer(kY) + t * V, D * x);
        dy = dy * silu(load_lanes(z_in + row * p_.z_stride, block.lanes));
      }
      store(buffer(kX) + t * V, x);
      store(buffer(kDy) + t * V, dy);
      for (const Side side : kSides) {
        Vec<T> dt = zero, slope = zero;  // of a term that is not there
        if (has_term(side, w.i + t / w.width, w.j + t % w.width)) {
          const In* from = static_cast<const In*>(p_.dt[side]) + block.channel;
          const Vec<T> raw = load_lanes(from + row * p_.dt_stride[side], block.lanes) + parameters_.bias(b, side);
          dt = p_.dt_softplus ? softplus(raw) : raw;
          slope = p_.dt_softplus ? softplus_slope(raw) : one;
        }
        store(buffer(kDt + side) + t * V, dt * log2e);
        store(buffer(kDtx + side) + t * V, dt * x);
        store(buffer(kSlope + side) + t * V, slope);
        store(buffer(kGB + side) + t * V, zero);
        store(buffer(kQA + side) + t * V, zero);
      }
    }
  }

  // What comes from the tiles below and to the right: (dstate, dim) in memory, [state][lane] here.
  void enter(const Window& w, const Block& block) {
    const std::int64_t size = p_.dstate * V;
    const auto get = [&](T* to, const T* from) {
      for (std::int64_t n = 0; n < p_.dstate; ++n)
        store(to + n * V, load_lanes(from + n * p_.dim + block.channel, block.lanes));
    };
    if (w.row + 1 == grid_.rows()) fill(below(), w.width * size, T(0));
    else
      for (int j = 0; j < w.width; ++j) get(below() + j * size, adjoints_.under(w.sequence, w.row, w.j + j));
    if (w.col + 1 == grid_.cols()) fill(right(), w.height * size, T(0));
    else
      for (int i = 0; i < w.height; ++i) get(right() + i * size, adjoints_.right_of(w.sequence, w.col, w.i + i));
    fill(dA(0), 2 * size, T(0));
  }
  void leave(const Window& w, const Block& block) const {
    const std::int64_t size = p_.dstate * V;
    const auto put = [&](T* to, const T* from) {
      for (std::int64_t n = 0; n < p_.dstate; ++n)
        store_lanes(to + n * p_.dim + block.channel, load(from + n * V), block.lanes);
    };
    if (w.row > 0)
      for (int j = 0; j < w.width; ++j) put(adjoints_.under(w.sequence, w.row - 1, w.j + j), below() + j * size);
    if (w.col > 0)
      for (int i = 0; i < w.height; ++i) put(adjoints_.right_of(w.sequence, w.col - 1, w.i + i), right() + i * size);
  }

  // kCount states from `n` on: their borders from the checkpoints, then forth and back.
  template <int kCount>
  void states(const Window& w, int b, const Block& block, std::int64_t n) {
    const std::int64_t N = p_.dstate;
    T *h = kept_, *a_top = h + kCount * kStateCells * V, *a_left = a_top + kCount * kPitch;
    const auto get = [&](int cell, bool there, const T* from) {
      for (int k = 0; k < kCount; ++k)
        store(h + (cell * kCount + k) * V,
              there ? load_lanes(from + (n + k) * p_.dim + block.channel, block.lanes) : Vec<T>(T(0)));
    };
    for (int j = 0; j < w.width; ++j)
      get(j + 1, w.row > 0, w.row > 0 ? states_.under(w.sequence, w.row - 1, w.j + j) : nullptr);
    for (int i = 0; i < w.height; ++i)
      get((i + 1) * kRow, w.col > 0, w.col > 0 ? states_.right_of(w.sequence, w.col - 1, w.i + i) : nullptr);

    const T *A_top = parameters_.A(b, kTop) + n * V, *A_left = parameters_.A(b, kLeft) + n * V;
    const Cells<T> cells{{buffer(kDt), buffer(kDt + 1)},
                         {buffer(kDtx), buffer(kDtx + 1)},
                         buffer(kDy),
                         {buffer(kGB), buffer(kGB + 1)},
                         {buffer(kQA), buffer(kQA + 1)},
                         buffer(kY),
                         {weights_ + n * kLine, weights_ + (N + n) * kLine},
                         weights_ + (2 * N + n) * kLine,
                         h,
                         {a_top, a_left}};
    if (p_.z) recompute<T, kCount, true>(w, cells, A_top, A_left);
    else recompute<T, kCount, false>(w, cells, A_top, A_left);
    const Adjoint<T> to{below() + n * V, right() + n * V, N * V, {dA(0) + n * V, dA(1) + n * V}, terms_};
    adjoint<T, kCount>(w, cells, A_top, A_left, to, [&](int i) { add_row<kCount>(w, i, n, b == 0); });
  }

  // The terms of one row of cells, added over the lanes, to those of the part.
  template <int kCount>
  void add_row(const Window& w, int i, std::int64_t n, bool first) const {
    const std::int64_t cells = p_.batch * p_.height * p_.width;
    const std::int64_t place = (w.sequence * p_.height + w.i + i) * p_.width + w.j;
    for (int which = 0; which < 3; ++which)
      for (int k = 0; k < kCount; ++k) {
        T* to = sums_.weights + ((which * channels_.parts + part_) * p_.dstate + n + k) * cells + place;
        const T* terms = terms_ + (which * kCount + k) * kTile * V;
        for (int j = 0; j < w.width; j += V) {
          const int count = w.width - j < V ? w.width - j : V;
          const Vec<T> sums = sum_rows(terms + j * V, V);
          store_lanes(to + j, first ? sums : load_lanes(to + j, count) + sums, count);
        }
      }
  }

  void epilogue(const Window& w, int b, const Block& block) {
    const Vec<T> D = parameters_.D(b), zero(T(0)), ln2(kLn2<T>);
    In* dx_out = static_cast<In*>(p_.dx) + block.channel;
    In* dz_out = static_cast<In*>(p_.dz) + block.channel;
    const In* z_in = static_cast<const In*>(p_.z) + block.channel;
    Vec<T> dD = zero, dbias[2] = {zero, zero};
    for (int t = 0; t < w.cells(); ++t) {
      const std::int64_t row = token_[t];
      const Vec<T> dy = load(buffer(kDy) + t * V), x = load(buffer(kX) + t * V);
      Vec<T> dx = D * dy;
      for (const Side side : kSides) {
        const Vec<T> gB = load(buffer(kGB + side) + t * V), qA = load(buffer(kQA + side) + t * V);
        const Vec<T> ddt = fma(x, gB, qA) * load(buffer(kSlope + side) + t * V);
        dx = fma(load(buffer(kDt + side) + t * V) * ln2, gB, dx);
        dbias[side] += ddt;
        store_lanes(static_cast<In*>(p_.ddt[side]) + block.channel + row * p_.dim, ddt, block.lanes);
      }
      store_lanes(dx_out + row * p_.dim, dx, block.lanes);
      dD = fma(dy, x, dD);
      if (p_.z) {
        const Vec<T> slope = silu_slope(load_lanes(z_in + row * p_.z_stride, block.lanes));
        store_lanes(dz_out + row * p_.dim, load(buffer(kDyOut) + t * V) * load(buffer(kY) + t * V) * slope, block.lanes);
      }
    }
    store(vectors_ + kDD * V, dD);
    for (const Side side : kSides) store(vectors_ + (kDBias + side) * V, dbias[side]);
  }

  // The sums over the tile's cells, to those of a tile row of a group of images.
  void contribute(const Block& block, std::int64_t c) const {
    const std::int64_t N = p_.dstate;
    T* to = sums_.parameters + c * (2 * N + 3) * p_.dim + block.channel;
    const auto add = [&](Vec<T> term) {
      store_lanes(to, load_lanes(to, block.lanes) + term, block.lanes);
      to += p_.dim;
    };
    for (std::int64_t n = 0; n < 2 * N; ++n) add(load(dA(0) + n * V) * Vec<T>(kLn2<T>));
    for (int i = 0; i < 3; ++i) add(load(vectors_ + i * V));
  }

  const GridScanBackward& p_;
  const Channels& channels_;
  const Borders<const T>& states_;
  const Borders<T>& adjoints_;
  const Sums<T>& sums_;
  std::int64_t part_;
  Grid grid_;
  Parameters<T> parameters_;
  Scratch<T> weights_;   // B_top, B_left, C: [state][cell]
  Scratch<T> row_;
  Scratch<T> carried_;   // from below, from the right, dA
  Scratch<T> vectors_;   // dD, ddt_bias
  Scratch<T> buffers_;   // [cell][lane]
  Scratch<T> kept_;      // states and decays
  Scratch<T> terms_;     // of a row of cells
  std::int64_t token_[kCells];
};

// (parts, dstate, cells in the order of the scan) -> (cells in that of memory, dstate)
template <typename In>
void add_parts(const GridScanBackward& p, std::int64_t parts, const acc_t<In>* sums, void* out) {
  using T = acc_t<In>;
  constexpr int V = Vec<T>::size;
  const std::int64_t cells = p.batch * p.height * p.width, N = p.dstate;
  const Grid grid(p);
  parallel_for(p.batch * p.height, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    Scratch<T> totals(N * V), row(N);
    for (std::int64_t line = begin; line < end; ++line)
      for (std::int64_t j = 0; j < p.width; j += V) {
        const int count = static_cast<int>(clamp(p.width - j, 0, V));
        for (std::int64_t n = 0; n < N; ++n) {
          Vec<T> total(T(0));
          for (std::int64_t part = 0; part < parts; ++part)
            total += load_lanes(sums + (part * N + n) * cells + line * p.width + j, count);
          store(totals + n * V, total);
        }
        for (int t = 0; t < count; ++t) {
          for (std::int64_t n = 0; n < N; ++n) row[n] = totals[n * V + t];
          narrow(static_cast<In*>(out) + grid.token(line / p.height, line % p.height, j + t) * N, row, N);
        }
      }
  });
}

// (contributions, every, dim), from the row `first` of each on -> (dim, width)
template <typename T>
void add_contributions(const GridScanBackward& p, const T* sums, std::int64_t contributions, std::int64_t first,
                       std::int64_t width, void* out) {
  const std::int64_t every = 2 * p.dstate + 3;
  for (std::int64_t d = 0; d < p.dim; ++d)
    for (std::int64_t n = 0; n < width; ++n) {
      T sum = T(0);
      for (std::int64_t c = 0; c < contributions; ++c) sum += sums[(c * every + first + n) * p.dim + d];
      static_cast<T*>(out)[d * width + n] = sum;
    }
}

template <typename In>
void backward(const GridScanBackward& p) {
  using T = acc_t<In>;
  constexpr int V = Vec<T>::size;
  const std::int64_t N = p.dstate, cells = p.batch * p.height * p.width;
  // By sizes alone, for the order of the sums to be that of any number of threads: up to 8 blocks make one part, while
  // 16 units are left to be spread.
  const Channels channels(p, V, clamp(ceil_div(p.dim, V) * p.batch / 16, 1, 8));
  const std::int64_t contributions = cells ? groups_of(p, channels) * Grid(p).rows() : 0;
  const std::int64_t parameters = contributions * (2 * N + 3) * p.dim;
  Scratch<T> weight_sums(3 * channels.parts * N * cells), parameter_sums(parameters);
  Scratch<T> passing(Borders<T>::count(p));
  fill<T>(parameter_sums, parameters, T(0));
  if (channels.parts > 0 && cells > 0) {
    const Sums<T> sums{weight_sums, parameter_sums};
    const Borders<const T> states(p, static_cast<const T*>(p.checkpoints), true);
    const Borders<T> adjoints(p, passing, false);
    for_tiles<true>(p, channels, [&](std::int64_t part) {
      return BackwardPart<In>(p, channels, states, adjoints, sums, part);
    });
  }
  void* const per_cell[] = {p.dB[kTop], p.dB[kLeft], p.dC};
  for (int i = 0; i < 3; ++i)
    add_parts<In>(p, channels.parts, weight_sums + i * channels.parts * N * cells, per_cell[i]);
  for (const Side side : kSides) {
    add_contributions<T>(p, parameter_sums, contributions, side * N, N, p.dA[side]);
    if (p.ddt_bias[side]) add_contributions<T>(p, parameter_sums, contributions, 2 * N + 1 + side, 1, p.ddt_bias[side]);
  }
  if (p.D) add_contributions<T>(p, parameter_sums, contributions, 2 * N, 1, p.dD);
}

}  // namespace

void grid_scan_backward(const GridScanBackward& p) {
  switch (p.dtype) {
    case DType::float64: return backward<double>(p);
    case DType::bfloat16: return backward<bfloat16>(p);
    case DType::float16: return backward<float16>(p);
    default: return backward<float>(p);
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
