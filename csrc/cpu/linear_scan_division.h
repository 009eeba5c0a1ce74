// How a linear scan is divided over threads, tiles and slices.
//
// Threads share the sequences x groups of columns. Where these are too few, sequences are cut into segments: each is
// first reduced to a map h -> P h + E, the maps are chained, then all segments are walked at once from their true states.
//
// A Pass is Forward or Backward of linear_scan.cpp: `output` walks positions from and to a state, `carry` reduces them to
// a map, `given` and `result` are the states at the two ends of a sequence.
#pragma once

#include "cpu/linear_scan_lanes.h"
#include "cpu/parallel.h"
#include "cpu/walk.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

constexpr std::int64_t kMinSegment = 256;  // tokens; a shorter segment gains less than passing its state costs
constexpr std::int64_t kSummed = 64;       // tokens whose part of da is summed before it joins the total

// Tensors larger than kCached bytes stream from memory. Then the tile is one row, so that memory is read in its order;
// the hardware follows that upwards but not downwards, so a walk downwards fetches the block of kReach bytes before its
// own, upwards. Smaller tensors are in a cache, and a longer tile keeps the states in registers for longer.
// Fastest of 2 K to 64 K each on an AMD EPYC 9004 (Zen 4): backward of (1, 4096, 1536) from 10 to 6.6 ms on one core.
constexpr std::int64_t kCached = 3 << 20, kTile = 16 << 10, kReach = 16 << 10;

// What a walk over (part of) a sequence needs besides its positions and columns.
template <typename T>
struct Task {
  Sequence sequence;
  const T* initial;    // (dim,), or null
  T* da;               // (dim,), where a is constant: the gradient of the last few tokens is added here
  std::int64_t reach;  // rows of a block, a power of two, where the walk goes down through memory; else 0

  // The row to fetch while `row` is at work: its mirror image in the block below, or -1.
  SSMKIT_INLINE std::int64_t ahead(std::int64_t row) const {
    if (!reach) return -1;
    const std::int64_t result = row - 2 * ((row - sequence.row) & (reach - 1)) - 1;
    return result >= sequence.row ? result : -1;
  }
};

SSMKIT_INLINE std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

template <class Pass>
class Division {
  using T = typename Pass::T;
  static constexpr std::int64_t V = Vec<T>::size;

 public:
  explicit Division(const Pass& pass)
      : pass_(pass), nseq_(pass.p.nseq), threads_(pass.p.threads), width_(pass.width), vectors_((width_ + V - 1) / V) {
    std::int64_t longest = 0;
    for (std::int64_t s = 0; s < nseq_; ++s) {
      const std::int64_t length = pass.walk.sequence(s).length;
      if (length > longest) longest = length;
    }
    // segments are walked twice, which pays from three threads on
    const std::int64_t units = nseq_ * vectors_;
    segments_ = threads_ >= 3 * units ? clamp(longest / kMinSegment, 1, threads_ / units) : 1;
    groups_ = segments_ > 1 ? vectors_ : clamp((threads_ + nseq_ - 1) / nseq_, 1, vectors_);
  }

  // Rows of `da`, the sums over each walk, zero at first: (walks, width), then as many for sums in progress. Or null.
  std::int64_t walks() const { return nseq_ * segments_; }

  void run(T* da) const { segments_ > 1 ? run_segments(da) : run_sequences(da); }

 private:
  Columns group(std::int64_t g) const {
    const std::int64_t end = vectors_ * (g + 1) / groups_ * V;
    return {vectors_ * g / groups_ * V, end < width_ ? end : width_};
  }

  // The sequences before s: their tokens, and one more for each so that this ascends.
  std::int64_t cost(std::int64_t s) const { return (pass_.p.cu_seqlens ? pass_.p.cu_seqlens[s] : s * pass_.p.seqlen) + s; }

  // Positions [lo, hi) of a sequence for some columns, tile by tile, from and to `state`; adds to row `walk` of da.
  void walk(std::int64_t s, std::int64_t lo, std::int64_t hi, Columns columns, T* state, T* da, std::int64_t walk) const {
    constexpr std::int64_t size = sizeof(typename Pass::In);
    const std::int64_t row = (columns.end - columns.begin) * size;
    const bool cached = pass_.p.batch * pass_.p.seqlen * width_ * size <= kCached;
    const bool one_slice = columns.end - columns.begin <= kMaxVectors * V;
    std::int64_t reach = pass_.p.reverse != Pass::kAdjoint && !cached ? 1 : 0;
    while (reach && 2 * reach * row <= kReach) reach *= 2;
    const T* initial = pass_.p.initial_state ? static_cast<const T*>(pass_.p.initial_state) + s * width_ : nullptr;
    T* recent = da ? da + (walks() + walk) * width_ : nullptr;
    const Task<T> task{pass_.walk.sequence(s), initial, recent, reach};
    const std::int64_t tile = clamp(kTile / row, 1, cached || one_slice ? kSummed : 1);
    std::int64_t unsummed = 0;
    for (std::int64_t done = 0; done < hi - lo; done += tile) {
      const std::int64_t count = hi - lo - done < tile ? hi - lo - done : tile;
      const std::int64_t first = Pass::kAdjoint ? hi - done - count : lo + done;
      for_slices<kMaxVectors, T>(columns, [&](auto slice) { pass_.output(task, first, first + count, slice, state); });
      unsummed += count;
      if (da && (unsummed >= kSummed || done + count == hi - lo)) {
        unsummed = 0;
        T* total = da + walk * width_;
        for (std::int64_t c = columns.begin; c < columns.end; ++c) total[c] += recent[c], recent[c] = T(0);
      }
    }
  }

  // Part i takes the pairs (sequence, group of columns) that begin in its share of the cost.
  void run_sequences(T* da) const {
    const std::int64_t parts = clamp(threads_, 1, nseq_ * groups_);
    const double share = static_cast<double>(cost(nseq_) * groups_) / static_cast<double>(parts);
    parallel_for(parts, static_cast<int>(threads_), [&](std::int64_t part, std::int64_t, int) {
      const auto lo = static_cast<std::int64_t>(share * static_cast<double>(part));
      const auto hi = part + 1 == parts ? cost(nseq_) * groups_
                                        : static_cast<std::int64_t>(share * static_cast<double>(part + 1));
      std::int64_t s = 0, above = nseq_;
      while (above - s > 1) {
        const std::int64_t middle = (s + above) / 2;
        (cost(middle) * groups_ <= lo ? s : above) = middle;
      }
      for (; s < nseq_ && cost(s) * groups_ < hi; ++s) {
        const std::int64_t length = pass_.walk.sequence(s).length;
        for (std::int64_t g = 0; g < groups_; ++g) {
          const std::int64_t begins = cost(s) * groups_ + g * (length + 1);
          if (begins < lo || begins >= hi) continue;
          copy(pass_.given(s), pass_.result(s), group(g));
          walk(s, 0, length, group(g), pass_.result(s), da, s);
        }
      }
    });
  }

  void run_segments(T* da) const {
    const std::int64_t tasks = walks() * groups_;
    const std::int64_t last = Pass::kAdjoint ? 0 : segments_ - 1;
    Scratch<T> products(walks() * width_), states(walks() * width_);
    // task -> body(sequence, segment, its row, first and last position, columns)
    const auto for_tasks = [&](const auto& body) {
      parallel_for(tasks, static_cast<int>(threads_), [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t task = begin; task < end; ++task) {
          const std::int64_t row = task / groups_, s = row / segments_, segment = row % segments_;
          const std::int64_t length = pass_.walk.sequence(s).length;
          body(s, segment, row * width_, length * segment / segments_, length * (segment + 1) / segments_,
               group(task % groups_));
        }
      });
    };
    for_tasks([&](std::int64_t s, std::int64_t segment, std::int64_t row, std::int64_t lo, std::int64_t hi, Columns c) {
      if (segment == last) return;
      for_slices<1, T>(c, [&](auto slice) {
        pass_.carry(pass_.walk.sequence(s), lo, hi, slice, products + row, states + row);
      });
    });
    for (std::int64_t s = 0; s < nseq_; ++s)
      for_slices<1, T>({0, width_}, [&](auto slice) { chain(s, slice, products, states); });
    for_tasks([&](std::int64_t s, std::int64_t segment, std::int64_t row, std::int64_t lo, std::int64_t hi, Columns c) {
      walk(s, lo, hi, c, states + row, da, row / width_);
      if (segment == last) copy(states + row, pass_.result(s), c);
    });
  }

  // From the maps of the segments of a sequence to the state before each.
  template <class Slice>
  void chain(std::int64_t s, Slice slice, const T* products, T* states) const {
    for (int v = 0; v < Slice::kVectors; ++v) {
      Vec<T> x = pass_.given(s) ? slice.get(pass_.given(s), v) : Vec<T>(T(0));
      for (std::int64_t i = 0; i < segments_; ++i) {
        const std::int64_t row = (s * segments_ + (Pass::kAdjoint ? segments_ - 1 - i : i)) * width_;
        const Vec<T> end = slice.get(states + row, v);
        slice.put(states + row, v, x);
        if (i + 1 < segments_) x = Pass::K::step(slice.get(products + row, v), x, end);
      }
    }
  }

  static void copy(const T* from, T* to, Columns columns) {
    for (std::int64_t c = columns.begin; c < columns.end; ++c) to[c] = from ? from[c] : T(0);
  }

  const Pass& pass_;
  std::int64_t nseq_, threads_, width_, vectors_, segments_, groups_;
};

// to[c] = rows[0][c] + rows[1][c] + ..., summed in runs of 64 rows.
template <typename T>
void sum_rows(const T* rows, std::int64_t count, std::int64_t width, T* to, int threads) {
  constexpr std::int64_t V = Vec<T>::size;
  parallel_for((width + V - 1) / V, threads, [&](std::int64_t begin, std::int64_t end, int) {
    const std::int64_t stop = end * V < width ? end * V : width;
    for_slices<kMaxVectors, T>({begin * V, stop}, [&](auto slice) {
      for (int v = 0; v < decltype(slice)::kVectors; ++v) {
        Vec<T> total(T(0));
        for (std::int64_t first = 0; first < count; first += 64) {
          Vec<T> part(T(0));
          for (std::int64_t i = first; i < count && i < first + 64; ++i) part += slice.get(rows + i * width, v);
          total += part;
        }
        slice.put(to, v, total);
      }
    });
  });
}

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
