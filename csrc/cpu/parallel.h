// Static split of a range over threads. The caller states the number of threads; one thread opens no parallel region.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Denormals count as zero inside a kernel: a state that has died away must not slow down the tokens after it.
class FlushDenormals {
 public:
  FlushDenormals() {
#if defined(__SSE2__)
    saved_ = _mm_getcsr();
    _mm_setcsr(saved_ | 0x8040);
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (std::uint64_t{1} << 24)));
#endif
  }
  ~FlushDenormals() {
#if defined(__SSE2__)
    _mm_setcsr(saved_);
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" ::"r"(saved_));
#endif
  }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__SSE2__)
  unsigned saved_;
#elif defined(__aarch64__)
  std::uint64_t saved_;
#endif
};

// body(begin, end, thread) for consecutive parts of 0..count-1, sizes differing by at most one.
// The split depends on count and threads alone. Nothing is called for an empty part.
template <typename Body>
inline void parallel_for(std::int64_t count, int threads, const Body& body) {
  if (count <= 0) return;
  const int parts = static_cast<int>(count < threads ? count : threads);
#ifdef _OPENMP
  if (parts > 1) {
#pragma omp parallel for schedule(static, 1) num_threads(parts)
    for (int part = 0; part < parts; ++part) {
      FlushDenormals flush;
      body(count * part / parts, count * (part + 1) / parts, part);
    }
    return;
  }
#endif
  FlushDenormals flush;
  body(std::int64_t{0}, count, 0);
}

// Uninitialised memory of one thread, aligned to a cache line, freed at the end of its scope.
template <typename T>
class Scratch {
 public:
  explicit Scratch(std::int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (static_cast<std::size_t>(count) * sizeof(T) + 64) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace ssmkit::SSMKIT_CAPABILITY
