#include "cpu/rates.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

constexpr int kChains = 8;

// Applies `step` to eight chains of vectors; the compiler may not drop a chain nor learn its value.
template <typename Step>
double run(const RatesParams& p, const Step& step) {
  parallel_for(p.threads, p.threads, [&](std::int64_t, std::int64_t, int) {
    Vec<float> chain[kChains];
    for (int c = 0; c < kChains; ++c) chain[c] = Vec<float>(-0.01f * static_cast<float>(c + 1));
    for (std::int64_t round = 0; round < p.rounds; ++round)
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) {
        chain[c] = step(chain[c]);
#if defined(__AVX512F__)
        asm volatile("" : "+v"(chain[c].v));
#elif defined(__SSE2__)
        asm volatile("" : "+x"(chain[c].v));
#else
        asm volatile("" : "+w"(chain[c].v));
#endif
      }
  });
  return static_cast<double>(p.rounds) * kChains * Vec<float>::size * p.threads;
}

}  // namespace

double run_exp2(const RatesParams& p) {
  return run(p, [](Vec<float> x) { return exp2(x); });
}

double run_fma(const RatesParams& p) {
  return run(p, [](Vec<float> x) { return fma(x, Vec<float>(0.999f), Vec<float>(0.001f)); });
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
