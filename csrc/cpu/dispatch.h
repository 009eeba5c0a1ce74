// Which of the compiled variants of a CPU kernel runs.
//
// How an op is laid out (copy rates.* to begin a new one; setup.py finds the files by their place):
//
//   csrc/cpu/<op>.h         the params struct, each pointer with its shape, and the declaration of the entry points:
//                               struct RatesParams { ... };
//                               SSMKIT_CPU_ENTRY(double, exp2_rate, (const RatesParams&))
//   csrc/cpu/<op>.cpp       compiled once per capability. Everything stands in
//                               namespace ssmkit::SSMKIT_CAPABILITY { namespace { helpers } entry points }
//                           so that no two variants share a symbol. It may include cpu/simd.h, cpu/parallel.h, its own
//                           header and C headers (<cstdint>, <cstring>, <cmath> for scalars); no standard containers,
//                           strings or algorithms: their inline functions would be shared between the variants.
//                           An op with products in bfloat16 has one more variant, of these alone: BF16_SOURCES in setup.py and
//                           SSMKIT_CPU_BF16_ENTRY, SSMKIT_CPU_BF16.
//   csrc/bindings/<op>.cpp  compiled once: fills the struct from integers and calls SSMKIT_CPU(entry)(params).
//   ssmkit/native/<op>.py   allocates outputs and passes data_ptr(), sizes and row strides.
#pragma once

namespace ssmkit {

enum class Capability { baseline, avx2, avx512, avx512_bf16 };

// The capability in use, chosen at load: the best that is both compiled and offered by this CPU.
Capability cpu_capability();

// "avx512_bf16", "avx512", "avx2", "baseline", or "auto" for the best. Returns null, or why the name is refused.
const char* set_cpu_capability(const char* name);

const char* name_of(Capability capability);

// Compiled in, and offered by this CPU and its operating system.
bool usable(Capability capability);

template <typename Function>
Function* choose(Function* baseline, Function* avx2, Function* avx512) {
  switch (cpu_capability()) {
    case Capability::avx512_bf16: case Capability::avx512: return avx512;
    case Capability::avx2: return avx2;
    default: return baseline;
  }
}

}  // namespace ssmkit

#ifdef SSMKIT_BUILT_AVX512
#define SSMKIT_IN_AVX512(name) &::ssmkit::avx512::name
#else
#define SSMKIT_IN_AVX512(name) nullptr
#endif
#ifdef SSMKIT_BUILT_AVX2
#define SSMKIT_IN_AVX2(name) &::ssmkit::avx2::name
#else
#define SSMKIT_IN_AVX2(name) nullptr
#endif

#ifdef SSMKIT_BUILT_AVX512_BF16
#define SSMKIT_IN_AVX512_BF16(name) &::ssmkit::avx512_bf16::name
#else
#define SSMKIT_IN_AVX512_BF16(name) SSMKIT_IN_AVX512(name)
#endif

// Declares an entry point in every variant's namespace; use it inside no namespace.
#define SSMKIT_CPU_ENTRY(result, name, arguments)          \
  namespace ssmkit::baseline { result name arguments; }    \
  namespace ssmkit::avx2 { result name arguments; }        \
  namespace ssmkit::avx512 { result name arguments; }

// The variant of `name` that runs here.
#define SSMKIT_CPU(name)                                                    \
  ::ssmkit::choose<std::remove_pointer_t<decltype(&::ssmkit::baseline::name)>>( \
      &::ssmkit::baseline::name, SSMKIT_IN_AVX2(name), SSMKIT_IN_AVX512(name))

// The same where there is a variant with bfloat16's dot products, in which dtypes other than bfloat16 are passed on.
#define SSMKIT_CPU_BF16_ENTRY(result, name, arguments) \
  SSMKIT_CPU_ENTRY(result, name, arguments)            \
  namespace ssmkit::avx512_bf16 { result name arguments; }
#define SSMKIT_CPU_BF16(name)                                                            \
  (::ssmkit::cpu_capability() == ::ssmkit::Capability::avx512_bf16 ? SSMKIT_IN_AVX512_BF16(name) : SSMKIT_CPU(name))
