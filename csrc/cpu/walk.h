// The order in which a scan visits the tokens: sequences, paths, restarts and pads, cut into chunks.
#pragma once

#include <cstdint>

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

constexpr int kChunk = 64;  // tokens between checkpoints

enum Flag : std::uint8_t { kRestart = 1, kPad = 2 };

struct Sequence {
  std::int64_t row;     // of its first token
  std::int64_t length;  // tokens
  std::int64_t slot;    // of its first checkpoint

  std::int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
};

struct Walk {
  std::int64_t seqlen;
  const std::int64_t* cu_seqlens;  // (nseq + 1,) or null
  const std::int32_t* order;       // (seqlen,) or null
  const std::uint8_t* flags;       // (batch, seqlen) or null
  bool reverse;

  Sequence sequence(std::int64_t s) const {
    if (!cu_seqlens) return {s * seqlen, seqlen, s * ((seqlen + kChunk - 1) / kChunk)};
    return {cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s], cu_seqlens[s] / kChunk + s};
  }

  std::int64_t row(const Sequence& sequence, std::int64_t position) const {
    const std::int64_t p = reverse ? sequence.length - 1 - position : position;
    return sequence.row + (order ? order[p] : p);
  }
};

// Tokens [begin, end) of a chunk with no restart among them; `restart`: the state is dropped before the first.
struct Run {
  int begin, end;
  bool restart;
};

// One chunk of a walk. Pads are taken out: what is left are `count` tokens in `nruns` runs.
struct Chunk {
  int count, nruns, npads;
  std::int64_t row[kChunk];
  std::int64_t pad[kChunk];
  Run run[kChunk + 1];

  void fill(const Walk& walk, const Sequence& sequence, std::int64_t index) {
    const std::int64_t first = index * kChunk;
    const int length = static_cast<int>(sequence.length - first < kChunk ? sequence.length - first : kChunk);
    count = npads = 0;
    nruns = 1;
    run[0] = {0, 0, false};
    for (int i = 0; i < length; ++i) {
      const std::int64_t r = walk.row(sequence, first + i);
      const std::uint8_t flag = walk.flags ? walk.flags[r] : 0;
      if (flag & kRestart) {
        Run& last = run[nruns - 1];
        last.end = count;
        if (last.begin == count) {
          last.restart = true;
        } else {
          run[nruns++] = {count, count, true};
        }
      }
      if (flag & kPad) {
        pad[npads++] = r;
      } else {
        row[count++] = r;
      }
    }
    run[nruns - 1].end = count;
  }
};

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
