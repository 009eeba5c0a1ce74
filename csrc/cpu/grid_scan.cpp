// Forward. A tile at a time: up to kMaxStates states of the cell to the left live in registers, those of the row above in
// a line of the tile's width. What is done once per cell (softplus, D, gate, conversions) goes through buffers of a tile.
#include "cpu/grid_scan.h"

#include "cpu/grid_scan_plan.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxStates = 16;
#else
constexpr int kMaxStates = 4;
#endif

// The numbers of a tile that do not depend on the state, [cell][lane] (dt comes times log2(e)), and its weights
// [cell][state].
template <typename T>
struct Cells {
  const T *dt[2], *dtx[2];
  const T *B[2], *C;
  T* y;
};

// kStates states of the cells of a tile. `line` [column][state][lane] holds those of the row above, `left`
// [row][state][lane] those of the column to the left; `dstate` states lie in each.
template <typename T, int kStates>
void walk_states(const Window& w, std::int64_t dstate, const Cells<T>& cells, const T* A_top, const T* A_left, T* line,
                 T* left) {
  constexpr int V = Vec<T>::size;
  const std::int64_t pitch = dstate * V;
  for (int i = 0; i < w.height; ++i) {
    Vec<T> h[kStates];
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) h[n] = load(left + i * pitch + n * V);
    for (int j = 0; j < w.width; ++j) {
      const int t = i * w.width + j;
      const Vec<T> dt_top = load(cells.dt[kTop] + t * V), dt_left = load(cells.dt[kLeft] + t * V);
      const Vec<T> dtx_top = load(cells.dtx[kTop] + t * V), dtx_left = load(cells.dtx[kLeft] + t * V);
      const Vec<T> weight = weight_of<T>(w.i + i, w.j + j);
      const T *B_top = cells.B[kTop] + t * dstate, *B_left = cells.B[kLeft] + t * dstate, *C = cells.C + t * dstate;
      T* above = line + j * pitch;
      Vec<T> y = load(cells.y + t * V);
#pragma GCC unroll 16
      for (int n = 0; n < kStates; ++n) {
        const Vec<T> a_top = exp2(load(A_top + n * V) * dt_top), a_left = exp2(load(A_left + n * V) * dt_left);
        const Vec<T> b = fma(dtx_top, Vec<T>(B_top[n]), dtx_left * Vec<T>(B_left[n]));
        h[n] = weight * fma(a_left, h[n], fma(a_top, load(above + n * V), b));
        store(above + n * V, h[n]);
        y = fma(Vec<T>(C[n]), h[n], y);
      }
      store(cells.y + t * V, y);
    }
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) store(left + i * pitch + n * V, h[n]);
  }
}

// All states: as many at a time as registers hold, then halves of that.
template <typename T, int kStates>
void walk_all(const Window& w, std::int64_t first, std::int64_t dstate, const Cells<T>& cells, const T* A_top,
              const T* A_left, T* line, T* left) {
  constexpr int V = Vec<T>::size;
  std::int64_t n = first;
  for (; n + kStates <= dstate; n += kStates) {
    Cells<T> at = cells;
    at.B[kTop] += n, at.B[kLeft] += n, at.C += n;
    walk_states<T, kStates>(w, dstate, at, A_top + n * V, A_left + n * V, line + n * V, left + n * V);
  }
  if constexpr (kStates > 1)
    if (n < dstate) walk_all<T, kStates / 2>(w, n, dstate, cells, A_top, A_left, line, left);
}

template <typename In>
class ForwardPart {
  using T = acc_t<In>;
  static constexpr int V = Vec<T>::size, kPitch = kPitchOf<T>;

 public:
  ForwardPart(const GridScanForward& p, const Channels& channels, const Borders<T>& borders, std::int64_t part)
      : p_(p), channels_(channels), borders_(borders), part_(part), grid_(p), parameters_(p, channels, part),
        weights_(3 * kCells * p.dstate), states_(2 * kTile * p.dstate * V), buffers_(5 * kPitch) {}

  void operator()(const Window& w, std::int64_t) {
    grid_.tokens(w, token_);
    const T* weights[3];
    for (int i = 0; i < 3; ++i) weights[i] = weights_ + i * kCells * p_.dstate;
    for (int t = 0; t < w.cells(); ++t)
      for (int i = 0; i < 3; ++i) {
        const In* from = static_cast<const In*>(i < 2 ? p_.B[i] : p_.C);
        widen(weights_ + (i * kCells + t) * p_.dstate, from + token_[t] * (i < 2 ? p_.B_stride[i] : p_.C_stride),
              p_.dstate);
      }
    const Cells<T> cells{{buffer(0), buffer(1)}, {buffer(2), buffer(3)}, {weights[0], weights[1]}, weights[2], buffer(4)};
    T *line = states_, *left = states_ + kTile * p_.dstate * V;
    for (int b = 0; b < channels_.count(part_); ++b) {
      const Block block = channels_.block(part_, b);
      enter(w, block, line, left);
      prologue(w, b, block);
      walk_all<T, kMaxStates>(w, 0, p_.dstate, cells, parameters_.A(b, kTop), parameters_.A(b, kLeft), line, left);
      epilogue(w, block);
      leave(w, block, line, left);
    }
  }

 private:
  T* buffer(int which) const { return buffers_ + which * kPitch; }

  // States along the borders: (dstate, dim) in memory, [state][lane] here.
  void get(T* to, const T* from, const Block& block) const {
    for (std::int64_t n = 0; n < p_.dstate; ++n)
      store(to + n * V, load_lanes(from + n * p_.dim + block.channel, block.lanes));
  }
  void put(T* to, const T* from, const Block& block) const {
    for (std::int64_t n = 0; n < p_.dstate; ++n)
      store_lanes(to + n * p_.dim + block.channel, load(from + n * V), block.lanes);
  }

  void enter(const Window& w, const Block& block, T* line, T* left) const {
    const std::int64_t size = p_.dstate * V;
    if (w.row == 0) fill(line, w.width * size, T(0));
    else
      for (int j = 0; j < w.width; ++j) get(line + j * size, borders_.under(w.sequence, w.row - 1, w.j + j), block);
    if (w.col == 0) fill(left, w.height * size, T(0));
    else
      for (int i = 0; i < w.height; ++i) get(left + i * size, borders_.right_of(w.sequence, w.col - 1, w.i + i), block);
  }
  void leave(const Window& w, const Block& block, const T* line, const T* left) const {
    const std::int64_t size = p_.dstate * V;
    if (w.row + 1 < grid_.rows())
      for (int j = 0; j < w.width; ++j) put(borders_.under(w.sequence, w.row, w.j + j), line + j * size, block);
    if (w.col + 1 < grid_.cols())
      for (int i = 0; i < w.height; ++i) put(borders_.right_of(w.sequence, w.col, w.i + i), left + i * size, block);
  }

  // Cells lie too far apart for the hardware to see a pattern, so the lines of the next block (after the last: of the
  // next tile) are asked for while this one is worked on.
  void prologue(const Window& w, int b, const Block& block) const {
    const Vec<T> D = parameters_.D(b), log2e(kLog2e<T>), zero(T(0));
    const In* x = static_cast<const In*>(p_.x) + block.channel;
    const bool last = b + 1 == channels_.count(part_);
    const std::int64_t ahead = last ? grid_.to_next(w, false) : 0;
    const std::int64_t channel = channels_.block(part_, last ? 0 : b + 1).channel;
    for (int t = 0; t < w.cells(); ++t) {
      const std::int64_t next = token_[t] + ahead;
      __builtin_prefetch(static_cast<const In*>(p_.x) + next * p_.x_stride + channel, 0, 2);
      __builtin_prefetch(static_cast<const In*>(p_.y) + next * p_.dim + channel, 1, 2);
      if (p_.z) __builtin_prefetch(static_cast<const In*>(p_.z) + next * p_.z_stride + channel, 0, 2);
      for (const Side side : kSides)
        __builtin_prefetch(static_cast<const In*>(p_.dt[side]) + next * p_.dt_stride[side] + channel, 0, 2);
      const Vec<T> x_t = load_lanes(x + token_[t] * p_.x_stride, block.lanes);
      store(buffer(4) + t * V, D * x_t);
      for (const Side side : kSides) {
        Vec<T> dt = zero;
        if (has_term(side, w.i + t / w.width, w.j + t % w.width)) {
          const In* from = static_cast<const In*>(p_.dt[side]) + block.channel;
          dt = load_lanes(from + token_[t] * p_.dt_stride[side], block.lanes) + parameters_.bias(b, side);
          if (p_.dt_softplus) dt = softplus(dt);
        }
        store(buffer(side) + t * V, dt * log2e);
        store(buffer(2 + side) + t * V, dt * x_t);
      }
    }
  }

  void epilogue(const Window& w, const Block& block) const {
    In* out = static_cast<In*>(p_.y) + block.channel;
    const In* z = static_cast<const In*>(p_.z) + block.channel;
    for (int t = 0; t < w.cells(); ++t) {
      Vec<T> y = load(buffer(4) + t * V);
      if (p_.z) y = y * silu(load_lanes(z + token_[t] * p_.z_stride, block.lanes));
      store_lanes(out + token_[t] * p_.dim, y, block.lanes);
    }
  }

  const GridScanForward& p_;
  const Channels& channels_;
  const Borders<T>& borders_;
  std::int64_t part_;
  Grid grid_;
  Parameters<T> parameters_;
  Scratch<T> weights_;  // B_top, B_left, C: [cell][state]
  Scratch<T> states_;   // of the row above, of the column to the left
  Scratch<T> buffers_;  // dt_top, dt_left (times log2(e)), dt_top x, dt_left x, y: [cell][lane]
  std::int64_t token_[kCells];
};

template <typename In>
void forward(const GridScanForward& p) {
  using T = acc_t<In>;
  if (p.batch * p.height * p.width * p.dim == 0) return;
  // neighbouring blocks share the rows of B and C; enough parts are left for every thread to have several
  const std::int64_t blocks = ceil_div(p.dim, Vec<T>::size) * p.batch;
  const Channels channels(p, Vec<T>::size, clamp(blocks / (4 * p.threads), 1, 4));
  Scratch<T> passing(p.checkpoints ? 0 : Borders<T>::count(p));
  const Borders<T> borders(p, p.checkpoints ? static_cast<T*>(p.checkpoints) : passing, p.checkpoints != nullptr);
  for_tiles<false>(p, channels, [&](std::int64_t part) { return ForwardPart<In>(p, channels, borders, part); });
}

}  // namespace

void grid_scan_forward(const GridScanForward& p) {
  switch (p.dtype) {
    case DType::float64: return forward<double>(p);
    case DType::bfloat16: return forward<bfloat16>(p);
    case DType::float16: return forward<float16>(p);
    default: return forward<float>(p);
  }
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
