#include "cpu/dispatch.h"

#include <cstring>

namespace ssmkit {
namespace {

constexpr Capability kAll[] = {Capability::avx512_bf16, Capability::avx512, Capability::avx2,
                               Capability::baseline};

bool built(Capability capability) {
  switch (capability) {
#ifdef SSMKIT_BUILT_AVX512_BF16
    case Capability::avx512_bf16: return true;
#endif
#ifdef SSMKIT_BUILT_AVX512
    case Capability::avx512: return true;
#endif
#ifdef SSMKIT_BUILT_AVX2
    case Capability::avx2: return true;
#endif
    case Capability::baseline: return true;
    default: return false;
  }
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool offered(Capability capability) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (capability == Capability::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (capability == Capability::avx512) return avx512;
  if (capability == Capability::avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return capability == Capability::baseline;
}

Capability best() {
  for (Capability capability : kAll)
    if (usable(capability)) return capability;
  return Capability::baseline;
}

Capability& current() {
  static Capability capability = best();
  return capability;
}

}  // namespace

bool usable(Capability capability) { return built(capability) && offered(capability); }

Capability cpu_capability() { return current(); }

const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::avx512_bf16: return "avx512_bf16";
    case Capability::avx512: return "avx512";
    case Capability::avx2: return "avx2";
    default: return "baseline";
  }
}

const char* set_cpu_capability(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    current() = best();
    return nullptr;
  }
  for (Capability capability : kAll) {
    if (std::strcmp(name, name_of(capability)) != 0) continue;
    if (!built(capability)) return "it was not compiled into this build of ssmkit";
    if (!offered(capability)) return "this CPU (or its operating system) does not offer it";
    current() = capability;
    return nullptr;
  }
  return "it is no CPU capability";
}

}  // namespace ssmkit
