// How the work of ssd is shared out: consecutive heads to a thread, or where these are too few, chunks.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/ssd_chunk.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Heads whose states, about this many bytes, stay in a core's second-level cache while a chunk is worked on.
constexpr std::int64_t kStateBytes = 512 << 10;

// run(sequence, group, head, heads, thread, first run of its group on this thread) over all heads of all sequences:
// each thread takes consecutive ones, in runs that share a group and whose states fit a cache.
template <typename T, typename Run>
inline void for_runs(const SsdParams& p, std::int64_t heads_at_once, const Run& run) {
  const std::int64_t per_group = p.nheads / p.ngroups;
  parallel_for(p.nseq * p.nheads, p.threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t unit = begin; unit < end;) {
      const std::int64_t head = unit % p.nheads, group = head / per_group, rest = (group + 1) * per_group - head;
      std::int64_t heads = end - unit < rest ? end - unit : rest;
      if (heads > heads_at_once) heads = heads_at_once;
      run(unit / p.nheads, static_cast<int>(group), head, static_cast<int>(heads), thread,
          unit == begin || head % per_group == 0);
      unit += heads;
    }
  });
}

template <typename T>
inline std::int64_t heads_at_once(const SsdSizes<T>& size) {
  const std::int64_t bytes = std::int64_t{size.n} * size.p_step * static_cast<int>(sizeof(T));
  return bytes == 0 || bytes > kStateBytes ? 1 : kStateBytes / bytes;
}

// What of a chunk is done: what it gives to the state that passes through, what it takes from it, or both in one walk.
enum class Work { state, outputs, both };

// Chunks of all sequences, one list: item i is chunk `index` of sequence `sequence`.
struct SsdItems {
  explicit SsdItems(const SsdParams& p) : p_(p), first_(p.nseq + 1) {
    first_[0] = 0;
    for (std::int64_t s = 0; s < p.nseq; ++s) first_[s + 1] = first_[s] + SsdSequence(p, s).chunks(p.chunk);
  }
  std::int64_t count() const { return first_[p_.nseq]; }
  std::int64_t begin(std::int64_t s) const { return first_[s]; }

  // run(item, sequence, index, group) for every chunk of every group in parallel
  template <typename MakeRun, typename Use>
  void each(const MakeRun& make, const Use& use) const {
    parallel_for(count() * p_.ngroups, p_.threads, [&](std::int64_t begin, std::int64_t end, int) {
      auto run = make();
      std::int64_t s = 0;
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t item = i / p_.ngroups;
        while (first_[s + 1] <= item) ++s;
        use(run, item, SsdSequence(p_, s), item - first_[s], static_cast<int>(i % p_.ngroups));
      }
    });
  }

  // Whether chunks keep the threads busier than heads do, by a tenth or more.
  bool better_than_heads() const {
    return 10 * rounds(p_.nseq * p_.nheads) * count() * p_.ngroups > 11 * rounds(count() * p_.ngroups) * p_.nseq * p_.nheads;
  }

 private:
  std::int64_t rounds(std::int64_t items) const { return (items + p_.threads - 1) / p_.threads; }

  const SsdParams& p_;
  Scratch<std::int64_t> first_;
};

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
