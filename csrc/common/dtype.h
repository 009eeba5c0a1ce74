// Element types as Python passes them (ssmkit.native.DTYPES lists the same numbers).
#pragma once

#include <cstdint>

namespace ssmkit {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, complex64 = 4, complex128 = 5 };

struct bfloat16 { std::uint16_t bits; };
struct float16 { std::uint16_t bits; };

// The type that states and sums are kept in.
template <typename T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <typename T> using acc_t = typename AccOf<T>::type;

}  // namespace ssmkit
