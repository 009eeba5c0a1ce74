// How the work of a selective scan is divided: lanes are channels, a block is one vector of channels, a part is a few
// neighbouring blocks that share B and C, a unit is a part of a group of sequences (or of a segment of one sequence).
#pragma once

#include "cpu/parallel.h"
#include "cpu/selective_scan.h"
#include "cpu/simd.h"
#include "cpu/walk.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

SSMKIT_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
SSMKIT_INLINE std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

struct Block {
  std::int64_t channel;  // of its first lane
  int lanes;
};

struct Part {
  std::int64_t block;  // its first
  int blocks;
  std::int64_t B_group, C_group;
  std::int64_t dt_group;  // all channels share the low-rank form of dt
};

// Cuts the channels into blocks and parts; no part crosses a group of B or of C.
class Plan {
 public:
  Plan(const SelectiveScanParams& p, int lanes, int blocks_per_part)
      : B_size_(p.dim / (p.B_groups ? p.B_groups : 1)),
        C_size_(p.dim / (p.C_groups ? p.C_groups : 1)),
        blocks_(p.dim + 1),
        parts_(p.dim + 1) {
    std::int64_t nblocks = 0;
    for (std::int64_t channel = 0; channel < p.dim;) {
      const std::int64_t b = channel / B_size_, c = channel / C_size_;
      std::int64_t end = channel + lanes;
      if (end > (b + 1) * B_size_) end = (b + 1) * B_size_;
      if (end > (c + 1) * C_size_) end = (c + 1) * C_size_;
      const bool joins =
          nparts_ && last().B_group == b && last().C_group == c && last().blocks < blocks_per_part;
      if (!joins) parts_[nparts_++] = {nblocks, 0, b, c, 0};
      ++last().blocks;
      blocks_[nblocks++] = {channel, static_cast<int>(end - channel)};
      channel = end;
    }
  }

  std::int64_t parts() const { return nparts_; }
  const Part& part(std::int64_t i) const { return parts_[i]; }
  const Block& block(const Part& part, int i) const { return blocks_[part.block + i]; }

  // Number of blocks that `dim` channels make, before any grouping into parts.
  static std::int64_t count(const SelectiveScanParams& p, int lanes) {
    const std::int64_t groups = p.B_groups > p.C_groups ? p.B_groups : p.C_groups;
    return groups ? groups * ceil_div(p.dim / groups, lanes) : ceil_div(p.dim, lanes);
  }

 private:
  Part& last() { return parts_[nparts_ - 1]; }

  std::int64_t B_size_, C_size_, nparts_ = 0;
  Scratch<Block> blocks_;
  Scratch<Part> parts_;
};

struct Range {
  std::int64_t begin, end;
};

// Part `i` of `parts` of the sequences, of about the same number of tokens each.
inline Range sequence_group(const SelectiveScanParams& p, std::int64_t i, std::int64_t parts) {
  if (!p.cu_seqlens) return {p.nseq * i / parts, p.nseq * (i + 1) / parts};
  const auto first_from = [&](std::int64_t token) {
    std::int64_t low = 0, high = p.nseq;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (p.cu_seqlens[middle] < token) low = middle + 1; else high = middle;
    }
    return low;
  };
  const std::int64_t tokens = p.seqlen;
  return {i == 0 ? 0 : first_from(tokens * i / parts), i + 1 == parts ? p.nseq : first_from(tokens * (i + 1) / parts)};
}

// Segments per sequence. Walking a segment twice (first for its final state alone) pays only where less than half of
// the threads would have a unit of their own.
inline int segments(const SelectiveScanParams& p, std::int64_t units) {
  if (units == 0 || units * 2 >= p.threads || p.seqlen < 4 * kChunk) return 1;
  return static_cast<int>(clamp(p.threads / units, 1, p.seqlen / (2 * kChunk)));
}

inline Walk walk_of(const SelectiveScanParams& p) { return {p.seqlen, p.cu_seqlens, p.order, p.flags, p.reverse}; }

// ---- lanes and their memory ---------------------------------------------------------------------------------------

template <typename In>
SSMKIT_INLINE Vec<acc_t<In>> load_lanes(const In* p, int lanes) {
  return lanes == Vec<acc_t<In>>::size ? load(p) : load(p, lanes);
}
template <typename In>
SSMKIT_INLINE void store_lanes(In* p, Vec<acc_t<In>> v, int lanes) {
  if (lanes == Vec<acc_t<In>>::size) store(p, v); else store(p, v, lanes);
}

// (lanes, dstate) in memory <-> [dstate][lane] in the buffer; unused lanes are 0.
template <typename T>
inline void gather_states(T* buffer, const T* from, int lanes, std::int64_t dstate) {
  constexpr int V = Vec<T>::size;
  for (std::int64_t n = 0; n < dstate; ++n)
    for (int i = 0; i < V; ++i) buffer[n * V + i] = i < lanes ? from[i * dstate + n] : T(0);
}
template <typename T>
inline void scatter_states(T* to, const T* buffer, int lanes, std::int64_t dstate) {
  for (int i = 0; i < lanes; ++i)
    for (std::int64_t n = 0; n < dstate; ++n) to[i * dstate + n] = buffer[n * Vec<T>::size + i];
}
template <typename T>
inline void fill(T* buffer, std::int64_t count, T value) {
  for (std::int64_t i = 0; i < count; ++i) buffer[i] = value;
}

// `count` numbers in the state's dtype.
template <typename In>
SSMKIT_INLINE void widen(acc_t<In>* to, const In* from, std::int64_t count) {
  constexpr int V = Vec<acc_t<In>>::size;
  std::int64_t i = 0;
  for (; i + V <= count; i += V) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}
template <typename In>
SSMKIT_INLINE void narrow(In* to, const acc_t<In>* from, std::int64_t count) {
  constexpr int V = Vec<acc_t<In>>::size;
  std::int64_t i = 0;
  for (; i + V <= count; i += V) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}
template <typename In>
SSMKIT_INLINE void zero_lanes(In* p, int lanes) {
  std::memset(static_cast<void*>(p), 0, static_cast<std::size_t>(lanes) * sizeof(In));
}

// dt of the blocks of a part as it comes, before bias and softplus: from memory, or expanded from its low-rank form.
template <typename In>
class StepSizes {
  using T = acc_t<In>;
  static constexpr int V = Vec<T>::size;

 public:
  StepSizes(const SelectiveScanParams& p, const Plan& plan, const Part& part)
      : p_(p), weight_(p.dt_rank * V * part.blocks), low_(p.dt_rank * kChunk) {
    for (int b = 0; p.dt_rank && b < part.blocks; ++b) {
      const auto [channel, lanes] = plan.block(part, b);
      gather_states(weight_ + b * p.dt_rank * V, static_cast<const T*>(p.dt_weight) + channel * p.dt_rank, lanes,
                    p.dt_rank);
    }
  }

  // To be called for every chunk.
  void fill_chunk(const Chunk& chunk) {
    for (int t = 0; p_.dt_rank && t < chunk.count; ++t)
      widen(low_ + t * p_.dt_rank, static_cast<const In*>(p_.dt) + chunk.row[t] * p_.dt_stride, p_.dt_rank);
  }

  // Block b, whose first channel this is, at token t of the chunk, which lies at this row.
  SSMKIT_INLINE Vec<T> at(int b, int t, std::int64_t row, std::int64_t channel, int lanes) const {
    if (!p_.dt_rank) return load_lanes(static_cast<const In*>(p_.dt) + row * p_.dt_stride + channel, lanes);
    Vec<T> sum(T(0));
    const T *weight = this->weight(b), *low = this->low(t);
    for (std::int64_t r = 0; r < p_.dt_rank; ++r) sum = fma(load(weight + r * V), Vec<T>(low[r]), sum);
    return sum;
  }

  const T* weight(int b) const { return weight_ + b * p_.dt_rank * V; }  // [rank][lane]
  const T* low(int t) const { return low_ + t * p_.dt_rank; }

 private:
  const SelectiveScanParams& p_;
  Scratch<T> weight_, low_;
};

// The lanes at one channel of an output, or of the sum that it is part of.
template <typename In>
class Output {
  using T = acc_t<In>;

 public:
  Output(void* out, std::int64_t stride, const RunningSum& sum, std::int64_t dim, std::int64_t channel, int lanes)
      : out_(static_cast<In*>(out) + channel),
        before_(sum.before ? static_cast<const T*>(sum.before) + channel : nullptr),
        after_(sum.after ? static_cast<T*>(sum.after) + channel : nullptr),
        stride_(stride), dim_(dim), lanes_(lanes) {}

  SSMKIT_INLINE void add(std::int64_t row, Vec<T> value) const {
    if (before_) value += load_lanes(before_ + row * dim_, lanes_);
    if (after_) store_lanes(after_ + row * dim_, value, lanes_);
    else store_lanes(out_ + row * stride_, value, lanes_);
  }
  // A pad is one in every scan.
  SSMKIT_INLINE void zero(std::int64_t row) const {
    if (after_) zero_lanes(after_ + row * dim_, lanes_);
    else zero_lanes(out_ + row * stride_, lanes_);
  }

 private:
  In* out_;
  const T* before_;
  T* after_;
  std::int64_t stride_, dim_;
  int lanes_;
};

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
