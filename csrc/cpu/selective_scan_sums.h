// Sums of the backward pass that several units contribute to. Each contribution is stored apart and they are added in
// order at the end, so that the result does not depend on which thread came first.
#pragma once

#include "cpu/selective_scan_plan.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// One copy per contribution. Complex numbers count as two along dstate.
template <typename T>
struct Partial {
  T* dB;    // per token (parts, rows, dstate); constant (contributions, dstate, dim)
  T* dC;    // likewise
  T* dA;    // (contributions, dstate, dim)
  T* dD;    // (contributions, dim)
  T* bias;  // (contributions, dim)
  T* dt;      // (parts, rows, dt_rank)
  T* weight;  // (contributions, dt_rank, dim)
};

// Per-token sums of the parts that read a group: (parts, rows, width) -> (rows, groups, width), rows `stride` apart.
template <typename Out>
void add_parts(const SelectiveScanBackward& p, const Plan& plan, const acc_t<Out>* partial, std::int64_t width,
               std::int64_t groups, std::int64_t Part::*group_of, void* out, std::int64_t stride) {
  using T = acc_t<Out>;
  const std::int64_t rows = p.batch * p.seqlen;
  parallel_for(rows, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    Scratch<T> sum(width);
    for (std::int64_t row = begin; row < end; ++row)
      for (std::int64_t group = 0; group < groups; ++group) {
        fill<T>(sum, width, T(0));
        for (std::int64_t i = 0; i < plan.parts(); ++i) {
          if (plan.part(i).*group_of != group) continue;
          const T* from = partial + (i * rows + row) * width;
          for (std::int64_t n = 0; n < width; ++n) sum[n] += from[n];
        }
        narrow(static_cast<Out*>(out) + row * stride + group * width, sum, width);
      }
  });
}

// (contributions, width, dim) -> (dim, width)
template <typename T>
void add_contributions(const SelectiveScanBackward& p, const T* partial, std::int64_t contributions, std::int64_t width,
                       void* out) {
  parallel_for(p.dim, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t d = begin; d < end; ++d)
      for (std::int64_t n = 0; n < width; ++n) {
        T sum = T(0);
        for (std::int64_t c = 0; c < contributions; ++c) sum += partial[(c * width + n) * p.dim + d];
        static_cast<T*>(out)[d * width + n] = sum;
      }
  });
}

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
