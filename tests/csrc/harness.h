// What the sanitized test of an op needs (tests/csrc/<op>.cpp, built and run by test_sanitized.py): numbers of any dtype
// in buffers that end exactly where the tensor ends, memory that is large on paper only, comparison with naive loops.
//
//     static const ssmkit::testing::Case kWhole("whole", [] { ...; ssmkit::testing::close("y", y.values(), expected, ...); });
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace ssmkit::testing {

// ---- cases ----------------------------------------------------------------------------------------------------------

struct Case {
  Case(const char* name, void (*run)()) : name(name), run(run) { all().push_back(this); }
  static std::vector<const Case*>& all() {
    static std::vector<const Case*> cases;
    return cases;
  }
  const char* name;
  void (*run)();
};

inline int& failures() {
  static int count = 0;
  return count;
}

inline void fail(const std::string& message) {
  std::printf("FAIL %s\n", message.c_str());
  ++failures();
}

// ---- numbers --------------------------------------------------------------------------------------------------------

// Uniform in [-1, 1), the same on every machine.
inline double uniform() {
  static std::uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) * 0x1p-52 - 1.0;
}

inline std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float64: case DType::complex64: return 8;
    case DType::complex128: return 16;
    case DType::float32: return 4;
    default: return 2;
  }
}

// Half precision by its definition: every finite number of 16 bits is a multiple of the spacing at its exponent.
inline std::uint16_t encode(double value, int mantissa_bits, int smallest_exponent) {
  const double magnitude = std::fabs(value);
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  if (exponent - 1 < smallest_exponent) exponent = smallest_exponent + 1;
  const double spacing = std::ldexp(1.0, exponent - 1 - mantissa_bits);
  const double steps = std::nearbyint(magnitude / spacing);
  const int field = static_cast<int>(steps) + ((exponent - 1 - smallest_exponent) << mantissa_bits);
  return static_cast<std::uint16_t>(field | (std::signbit(value) ? 0x8000 : 0));
}
inline double decode(std::uint16_t bits, int mantissa_bits, int smallest_exponent) {
  const int field = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = field ? field - 1 : 0;
  const double value =
      std::ldexp(mantissa + (field ? 1 << mantissa_bits : 0), exponent + smallest_exponent - mantissa_bits);
  return bits & 0x8000 ? -value : value;
}

inline void put(unsigned char* at, DType dtype, double value) {
  const float single = static_cast<float>(value);
  const std::uint16_t half =
      dtype == DType::bfloat16 ? encode(value, 7, -126) : dtype == DType::float16 ? encode(value, 10, -14) : 0;
  switch (dtype) {
    case DType::float64: case DType::complex128: std::memcpy(at, &value, 8); break;
    case DType::float32: case DType::complex64: std::memcpy(at, &single, 4); break;
    default: std::memcpy(at, &half, 2);
  }
}
inline double get(const unsigned char* at, DType dtype) {
  double value;
  float single;
  std::uint16_t half;
  switch (dtype) {
    case DType::float64: case DType::complex128: std::memcpy(&value, at, 8); return value;
    case DType::float32: case DType::complex64: std::memcpy(&single, at, 4); return single;
    default:
      std::memcpy(&half, at, 2);
      return dtype == DType::bfloat16 ? decode(half, 7, -126) : decode(half, 10, -14);
  }
}

// Rows of `width` numbers, `stride` apart; the buffer ends with the last number of the last row. Complex numbers count
// as two. What lies between the rows is NaN.
class Tensor {
 public:
  Tensor(DType dtype, std::int64_t rows, std::int64_t width, std::int64_t stride)
      : dtype_(dtype), rows_(rows), width_(width), stride_(stride),
        element_(size_of(dtype) / (complex() ? 2 : 1)),
        bytes_(rows ? static_cast<std::size_t>(((rows - 1) * stride + width) * (complex() ? 2 : 1)) * element_ : 0),
        data_(static_cast<unsigned char*>(std::malloc(bytes_ ? bytes_ : 1))) {
    std::memset(data_, 0xff, bytes_);
  }
  Tensor(DType dtype, std::int64_t rows, std::int64_t width) : Tensor(dtype, rows, width, width) {}
  ~Tensor() { std::free(data_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  Tensor& random(double scale, double shift = 0.0) {
    for (std::int64_t i = 0; i < count(); ++i) put(at(i), dtype_, shift + scale * uniform());
    return *this;
  }
  Tensor& set(const std::vector<double>& values) {
    for (std::int64_t i = 0; i < count(); ++i) put(at(i), dtype_, values[i]);
    return *this;
  }
  // As the kernel sees them, rounded to the dtype; real and imaginary parts in turn.
  std::vector<double> values() const {
    std::vector<double> result;
    for (std::int64_t i = 0; i < count(); ++i) result.push_back(get(at(i), dtype_));
    return result;
  }
  void* data() const { return data_; }
  std::int64_t stride() const { return stride_; }
  DType dtype() const { return dtype_; }

 private:
  bool complex() const { return dtype_ == DType::complex64 || dtype_ == DType::complex128; }
  std::int64_t count() const { return rows_ * width_ * (complex() ? 2 : 1); }
  unsigned char* at(std::int64_t i) const {
    const std::int64_t row = width_ * (complex() ? 2 : 1);
    return data_ + (i / row * stride_ * (complex() ? 2 : 1) + i % row) * static_cast<std::int64_t>(element_);
  }

  DType dtype_;
  std::int64_t rows_, width_, stride_;
  std::size_t element_, bytes_;
  unsigned char* data_;
};

// Address space of any size that costs memory only where it is touched; null where the system refuses.
class Sparse {
 public:
  explicit Sparse(std::size_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~Sparse() {
    if (*this) munmap(data_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;

  explicit operator bool() const { return data_ != MAP_FAILED; }
  template <typename T> T* as() const { return static_cast<T*>(data_); }

 private:
  std::size_t bytes_;
  void* data_;
};

// ---- comparison -----------------------------------------------------------------------------------------------------

// The bounds of ssmkit.testing.assert_close times `slack` (whoever passes it states the cause), relative to `size`: the
// expected numbers, or for sums of terms that cancel the sums of their absolute values.
inline void close(const std::string& name, const std::vector<double>& actual, const std::vector<double>& expected,
                  const std::vector<double>& size, DType dtype, double slack = 1.0) {
  const bool wide = dtype == DType::float64 || dtype == DType::complex128;
  const double accumulated = wide ? 0x1p-52 : 0x1p-23;
  const double eps = dtype == DType::bfloat16 ? 0x1p-7 : dtype == DType::float16 ? 0x1p-10 : accumulated;
  if (actual.size() != expected.size() || size.size() != expected.size()) return fail(name + ": sizes differ");
  double error2 = 0, size2 = 0, worst = 0, largest = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (!std::isfinite(actual[i])) return fail(name + ": not finite at " + std::to_string(i));
    const double error = std::fabs(actual[i] - expected[i]);
    error2 += error * error, size2 += size[i] * size[i];
    worst = std::fmax(worst, error), largest = std::fmax(largest, std::fabs(size[i]));
  }
  if (std::sqrt(error2) > slack * (eps / 2 + 4 * accumulated) * std::sqrt(size2))
    fail(name + ": RMS error " + std::to_string(std::sqrt(error2 / size2) / accumulated) + " eps");
  if (worst > slack * (eps + 16 * accumulated) * largest)
    fail(name + ": worst error " + std::to_string(worst / largest / accumulated) + " eps");
}

inline void close(const std::string& name, const std::vector<double>& actual, const std::vector<double>& expected,
                  DType dtype, double slack = 1.0) {
  close(name, actual, expected, expected, dtype, slack);
}

}  // namespace ssmkit::testing
