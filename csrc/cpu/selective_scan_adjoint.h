// One chunk of one block backwards: states recomputed from the checkpoint, then walked back with their adjoint g:
//
//     g_l = a_{l+1} g_{l+1} + C_l dy_l              dC_l = sum_d dy_l h_l        dB_l = sum_d dt_l x_l g_l
//     q_l = g_l a_l h_{l-1}                         dA = sum_l dt_l q_l
#pragma once

#include "cpu/selective_scan_plan.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

constexpr int kPitch = kChunk + 1;  // tokens; one line more than a power of two, lest the buffers share cache sets

// The state-independent numbers of one chunk of one block, [token][lane].
template <typename T>
struct Tile {
  const T *dt, *dtx, *dy;  // dt log2(e), dt x, dy (through the gate)
  T *gB, *qA, *y;          // sum_n g B, sum_n q A, sum_n C h (only with a gate)
};

// Per-state sums of one block; B and C of the chunk as [state][token], or constant as [state][lane].
template <typename T>
struct StateSums {
  const T *A, *B, *C, *checkpoint;
  T *g, *dA;
  T *dB, *dC;  // per token [state][token][lane], constant [state][lane]
};

template <typename T, int kStates, bool kLaneB, bool kLaneC, bool kGated, bool kFirst>
void adjoint_states(const Chunk& chunk, const Tile<T>& tile, const StateSums<T>& s, T* decay, T* states) {
  constexpr int V = Vec<T>::size;
  constexpr int kStride = kPitch * V;
  const Vec<T> zero(T(0));
  Vec<T> h[kStates], A[kStates];
#pragma GCC unroll 4
  for (int n = 0; n < kStates; ++n) {
    A[n] = load(s.A + n * V);
    h[n] = load(s.checkpoint + n * V);
    store(states + n * kStride, h[n]);
  }
  const auto B_at = [&](int n, int t) { return kLaneB ? load(s.B + n * V) : Vec<T>(s.B[n * kChunk + t]); };
  const auto C_at = [&](int n, int t) { return kLaneC ? load(s.C + n * V) : Vec<T>(s.C[n * kChunk + t]); };

  for (int r = 0; r < chunk.nruns; ++r) {
    const Run run = chunk.run[r];
    if (run.restart)
      for (int n = 0; n < kStates; ++n) h[n] = zero;
    for (int t = run.begin; t < run.end; ++t) {
      const Vec<T> dt = load(tile.dt + t * V), dtx = load(tile.dtx + t * V);
      Vec<T> y;
      if constexpr (kGated) y = load(tile.y + t * V);
#pragma GCC unroll 4
      for (int n = 0; n < kStates; ++n) {
        const Vec<T> a = exp2(A[n] * dt);
        h[n] = fma(a, h[n], dtx * B_at(n, t));
        store(decay + n * kStride + t * V, a);
        store(states + n * kStride + (t + 1) * V, h[n]);
        if constexpr (kGated) y = fma(C_at(n, t), h[n], y);
      }
      if constexpr (kGated) store(tile.y + t * V, y);
    }
  }

  Vec<T> g[kStates], dA[kStates], dB[kStates], dC[kStates];
#pragma GCC unroll 4
  for (int n = 0; n < kStates; ++n) {
    g[n] = load(s.g + n * V);
    dA[n] = dB[n] = dC[n] = zero;
  }
  for (int r = chunk.nruns - 1; r >= 0; --r) {
    const Run run = chunk.run[r];
    for (int t = run.end - 1; t >= run.begin; --t) {
      const Vec<T> dt = load(tile.dt + t * V), dtx = load(tile.dtx + t * V), dy = load(tile.dy + t * V);
      Vec<T> gB = load(tile.gB + t * V), qA = load(tile.qA + t * V);
      const bool dropped = run.restart && t == run.begin;
#pragma GCC unroll 4
      for (int n = 0; n < kStates; ++n) {
        const T* state = states + n * kStride + t * V;
        const int lanes = n * kStride + t * V;
        const Vec<T> h_n = load(state + V), before = dropped ? zero : load(state);
        const Vec<T> g_n = fma(C_at(n, t), dy, g[n]);
        if constexpr (kLaneC) dC[n] = fma(dy, h_n, dC[n]);
        else store(s.dC + lanes, kFirst ? dy * h_n : fma(dy, h_n, load(s.dC + lanes)));
        if constexpr (kLaneB) dB[n] = fma(dtx, g_n, dB[n]);
        else store(s.dB + lanes, kFirst ? dtx * g_n : fma(dtx, g_n, load(s.dB + lanes)));
        gB = fma(g_n, B_at(n, t), gB);
        g[n] = g_n * load(decay + n * kStride + t * V);
        const Vec<T> q = g[n] * before;
        qA = fma(q, A[n], qA);
        dA[n] = fma(q, dt, dA[n]);
      }
      store(tile.gB + t * V, gB);
      store(tile.qA + t * V, qA);
    }
    if (run.restart)
      for (int n = 0; n < kStates; ++n) g[n] = zero;
  }
#pragma GCC unroll 4
  for (int n = 0; n < kStates; ++n) {
    store(s.g + n * V, g[n]);
    store(s.dA + n * V, load(s.dA + n * V) + dA[n]);
    if constexpr (kLaneB) store(s.dB + n * V, load(s.dB + n * V) + dB[n]);
    if constexpr (kLaneC) store(s.dC + n * V, load(s.dC + n * V) + dC[n]);
  }
}

// g <- a (g + C dy) over a chunk: the adjoint alone.
template <typename T, bool kLaneC>
void adjoint_only(const Chunk& chunk, const T* dt, const T* dy, const T* A, const T* C, T* g, std::int64_t dstate) {
  constexpr int V = Vec<T>::size;
  for (std::int64_t n = 0; n < dstate; ++n) {
    const Vec<T> A_n = load(A + n * V);
    Vec<T> g_n = load(g + n * V);
    for (int r = chunk.nruns - 1; r >= 0; --r) {
      for (int t = chunk.run[r].end - 1; t >= chunk.run[r].begin; --t) {
        const Vec<T> C_n = kLaneC ? load(C + n * V) : Vec<T>(C[n * kChunk + t]);
        g_n = exp2(A_n * load(dt + t * V)) * fma(C_n, load(dy + t * V), g_n);
      }
      if (chunk.run[r].restart) g_n = Vec<T>(T(0));
    }
    store(g + n * V, g_n);
  }
}

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
