#include "cpu/rates.h"

#include <tuple>
#include <utility>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Enough independent chains to fill two pipes of five cycles.
constexpr int kChains = 10;

// Keeps `x` in a register, its value unknown to the compiler.
inline void pin(Vec<float>& x) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(x.v));
#elif defined(__SSE2__)
  asm volatile("" : "+x"(x.v));
#else
  asm volatile("" : "+w"(x.v));
#endif
}

// Applies `step` to every chain in turn. Chains are single variables, not an array, which the compiler would keep in
// memory.
template <typename Step, int... chain>
double run(const RatesParams& p, const Step& step, std::integer_sequence<int, chain...>) {
  parallel_for(p.threads, p.threads, [&](std::int64_t, std::int64_t, int) {
    std::tuple chains{Vec<float>(-0.01f * static_cast<float>(chain + 1))...};
    for (std::int64_t round = 0; round < p.rounds; ++round)
      ((std::get<chain>(chains) = step(std::get<chain>(chains)), pin(std::get<chain>(chains))), ...);
  });
  return static_cast<double>(p.rounds) * kChains * Vec<float>::size * p.threads;
}

}  // namespace

double run_exp2(const RatesParams& p) {
  return run(p, [](Vec<float> x) { return exp2(x); }, std::make_integer_sequence<int, kChains>());
}

double run_fma(const RatesParams& p) {
  const auto step = [](Vec<float> x) { return fma(x, Vec<float>(0.999f), Vec<float>(0.001f)); };
  return run(p, step, std::make_integer_sequence<int, kChains>());
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
