// How the work of a grid scan is divided: lanes are channels, a block is one vector of channels, a part is a few
// neighbouring blocks that share B and C, and a tile is kTile x kTile cells of an image, whose states depend on the
// states along its upper and its left border alone.
#pragma once

#include "cpu/grid_scan.h"
#include "cpu/selective_scan_plan.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

constexpr int kTile = 16;
constexpr int kCells = kTile * kTile;
// From one buffer of a tile to the next: a line more than a power of two, lest they share the sets of the cache.
template <typename T> constexpr int kPitchOf = kCells * Vec<T>::size + 64 / static_cast<int>(sizeof(T));

// One tile, in the coordinates of the scan: row and column 0 are where it starts.
struct Window {
  std::int64_t sequence, row, col;  // of its tile
  std::int64_t i, j;                // of its first cell
  int height, width;

  int cells() const { return height * width; }
};

// The tiles of an image, and where their cells lie in memory.
class Grid {
 public:
  explicit Grid(const GridScanParams& p) : p_(p) {}

  std::int64_t rows() const { return ceil_div(p_.height, kTile); }
  std::int64_t cols() const { return ceil_div(p_.width, kTile); }

  Window window(std::int64_t sequence, std::int64_t row, std::int64_t col) const {
    const std::int64_t i = row * kTile, j = col * kTile;
    return {sequence, row, col, i, j, static_cast<int>(clamp(p_.height - i, 0, kTile)),
            static_cast<int>(clamp(p_.width - j, 0, kTile))};
  }

  // The row of memory of cell (i, j).
  std::int64_t token(std::int64_t sequence, std::int64_t i, std::int64_t j) const {
    const std::int64_t line = p_.from_bottom ? p_.height - 1 - i : i;
    return (sequence * p_.height + line) * p_.width + (p_.from_right ? p_.width - 1 - j : j);
  }

  // From the cells of a window to those of the next one to be worked on, in rows of memory; 0 where it is in another
  // row of tiles.
  std::int64_t to_next(const Window& w, bool backwards) const {
    if (backwards ? w.col == 0 : w.col + 1 == cols()) return 0;
    return p_.from_right == backwards ? kTile : -kTile;
  }

  // The rows of memory of a window's cells.
  void tokens(const Window& w, std::int64_t* token_of) const {
    for (int i = 0; i < w.height; ++i)
      for (int j = 0; j < w.width; ++j) *token_of++ = token(w.sequence, w.i + i, w.j + j);
  }

 private:
  const GridScanParams& p_;
};

// What one tile leaves for those below it and to its right: (slots, dstate, dim). Of each image first the states along
// the lower border of every tile row but the last, then those along the right border of every tile column but the last.
// If they are not kept, there is one such row and column of each image, overwritten from tile to tile.
template <typename T>
class Borders {
 public:
  Borders(const GridScanParams& p, T* states, bool kept)
      : height_(p.height), width_(p.width), slot_(p.dstate * p.dim), states_(states),
        rows_(kept ? Grid(p).rows() - 1 : 1), cols_(kept ? Grid(p).cols() - 1 : 1), kept_(kept) {}

  static std::int64_t count(const GridScanParams& p) { return p.batch * (p.height + p.width) * p.dstate * p.dim; }

  // Under tile row `row`, at column j; to the right of tile column `col`, at row i. Channel 0 of state 0.
  T* under(std::int64_t sequence, std::int64_t row, std::int64_t j) const {
    return at(sequence, (kept_ ? row : 0) * width_ + j);
  }
  T* right_of(std::int64_t sequence, std::int64_t col, std::int64_t i) const {
    return at(sequence, rows_ * width_ + (kept_ ? col : 0) * height_ + i);
  }

 private:
  T* at(std::int64_t sequence, std::int64_t slot) const {
    return states_ + (sequence * (rows_ * width_ + cols_ * height_) + slot) * slot_;
  }

  std::int64_t height_, width_, slot_;
  T* states_;
  std::int64_t rows_, cols_;
  bool kept_;
};

// Channels cut into blocks and these into parts of about the same number of blocks.
struct Channels {
  std::int64_t dim, blocks, parts;
  int lanes;

  Channels(const GridScanParams& p, int lanes, std::int64_t per_part)
      : dim(p.dim), blocks(ceil_div(p.dim, lanes)), parts(ceil_div(blocks, per_part)), lanes(lanes) {}

  std::int64_t first(std::int64_t part) const { return blocks * part / parts; }
  int count(std::int64_t part) const { return static_cast<int>(first(part + 1) - first(part)); }
  Block block(std::int64_t part, int b) const {
    const std::int64_t channel = (first(part) + b) * lanes;
    return {channel, static_cast<int>(clamp(dim - channel, 0, lanes))};
  }
};

// The parameters of a part's blocks, in lanes.
template <typename T>
class Parameters {
  static constexpr int V = Vec<T>::size;

 public:
  Parameters(const GridScanParams& p, const Channels& channels, std::int64_t part)
      : size_(p.dstate * V), A_(2 * size_ * channels.count(part)), vectors_(3 * V * channels.count(part)) {
    const auto lanes_of = [](const void* from, const Block& block) {
      return from ? load_lanes(static_cast<const T*>(from) + block.channel, block.lanes) : Vec<T>(T(0));
    };
    for (int b = 0; b < channels.count(part); ++b) {
      const Block block = channels.block(part, b);
      for (const Side side : kSides) {
        const T* from = static_cast<const T*>(p.A[side]) + block.channel * p.dstate;
        gather_states(A_ + (2 * b + side) * size_, from, block.lanes, p.dstate);
        store(vectors_ + (3 * b + side) * V, lanes_of(p.dt_bias[side], block));
      }
      store(vectors_ + (3 * b + 2) * V, lanes_of(p.D, block));
    }
  }

  const T* A(int b, Side side) const { return A_ + (2 * b + side) * size_; }
  Vec<T> bias(int b, Side side) const { return load(vectors_ + (3 * b + side) * V); }
  Vec<T> D(int b) const { return load(vectors_ + (3 * b + 2) * V); }

 private:
  std::int64_t size_;
  Scratch<T> A_, vectors_;
};

// Weight of a cell's sum of two terms, or of the one it has.
template <typename T>
SSMKIT_INLINE Vec<T> weight_of(std::int64_t i, std::int64_t j) {
  return Vec<T>(i > 0 && j > 0 ? T(0.5) : T(1));
}
// Whether a cell has the term of a side. The first cell has that from the left.
SSMKIT_INLINE bool has_term(Side side, std::int64_t i, std::int64_t j) {
  return side == kTop ? i > 0 : i == 0 || j > 0;
}

// Groups of images, whose sums are kept together. By sizes alone, for the order of sums to be that of any number of threads.
inline std::int64_t groups_of(const GridScanParams& p, const Channels& channels) {
  return clamp(ceil_div(64, channels.parts ? channels.parts : 1), 1, p.batch);
}

// Each tile of each image once for each part, after the tiles above it and to its left; `backwards`: after those below
// it and to its right. make(part) gives what is called with each window and the group that its image is in.
// Where parts and groups do not occupy the threads, tiles of one diagonal, which do not depend on each other, do.
template <bool kBackwards, typename Make>
void for_tiles(const GridScanParams& p, const Channels& channels, const Make& make) {
  const Grid grid(p);
  const std::int64_t rows = grid.rows(), cols = grid.cols(), groups = groups_of(p, channels);
  const auto window = [&](std::int64_t sequence, std::int64_t row, std::int64_t col) {
    return kBackwards ? grid.window(sequence, rows - 1 - row, cols - 1 - col) : grid.window(sequence, row, col);
  };
  const std::int64_t units = channels.parts * groups;
  if (units * 2 > p.threads) {
    parallel_for(units, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t unit = begin; unit < end; ++unit) {
        auto worker = make(unit / groups);
        const std::int64_t group = unit % groups, last = p.batch * (group + 1) / groups;
        for (std::int64_t s = p.batch * group / groups; s < last; ++s)
          for (std::int64_t row = 0; row < rows; ++row)
            for (std::int64_t col = 0; col < cols; ++col) worker(window(s, row, col), group);
      }
    });
    return;
  }
  for (std::int64_t k = 0; k < ceil_div(p.batch, groups); ++k)
    for (std::int64_t diagonal = 0; diagonal < rows + cols - 1; ++diagonal) {
      const std::int64_t low = diagonal < cols ? 0 : diagonal - cols + 1;
      const std::int64_t count = (diagonal < rows ? diagonal + 1 : rows) - low;
      parallel_for(units * count, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t at = begin; at < end; ++at) {
          const std::int64_t unit = at / count, row = low + at % count, group = unit % groups;
          const std::int64_t s = p.batch * group / groups + k;
          if (s < p.batch * (group + 1) / groups) make(unit / groups)(window(s, row, diagonal - row), group);
        }
      });
    }
}

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
