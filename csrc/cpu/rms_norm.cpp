// A row is read once into a buffer of the accumulation type, which stays in the first cache, and written once; so the
// element types appear only where rows are read and written. Threads share the rows. Gradients of the parameters are
// summed over blocks of rows whose number depends on the sizes alone, then over the blocks in order: the bits do not
// depend on the number of threads.
#include "cpu/rms_norm.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

constexpr std::int64_t kMinBlock = 64;   // rows summed before a partial sum is kept
constexpr std::int64_t kMaxBlocks = 64;  // partial sums of dweight and dbias

// body(i, n) for every vector of the range; n lanes are wanted, fewer than a vector at the end only.
template <typename T, typename Body>
SSMKIT_INLINE void for_lanes(std::int64_t count, const Body& body) {
  constexpr int size = Vec<T>::size;
  std::int64_t i = 0;
  for (; i + size <= count; i += size) body(i, size);
  if (i < count) body(i, static_cast<int>(count - i));
}

template <typename T, typename In>
SSMKIT_INLINE Vec<T> load_lanes(const In* p, int n) {
  return n == Vec<T>::size ? load(p) : load(p, n);
}
template <typename T, typename Out>
SSMKIT_INLINE void store_lanes(Out* p, Vec<T> a, int n) {
  if (n == Vec<T>::size) store(p, a);
  else store(p, a, n);
}

// Calls body with a typed null pointer for the dtype; T decides between float64 and the rest.
template <typename T, typename Body>
SSMKIT_INLINE void with_dtype(DType dtype, const Body& body) {
  if constexpr (sizeof(T) == 8) {
    body(static_cast<double*>(nullptr));
  } else {
    switch (dtype) {
      case DType::bfloat16: return body(static_cast<bfloat16*>(nullptr));
      case DType::float16: return body(static_cast<float16*>(nullptr));
      default: return body(static_cast<float*>(nullptr));
    }
  }
}

// to[i] = row `row` of from, widened.
template <typename T>
void read_row(DType dtype, const void* from, std::int64_t row, std::int64_t stride, std::int64_t dim, T* to) {
  with_dtype<T>(dtype, [&](auto* typed) {
    const auto* p = static_cast<decltype(typed)>(const_cast<void*>(from)) + row * stride;
    for_lanes<T>(dim, [&](std::int64_t i, int n) { store_lanes<T>(to + i, load_lanes<T>(p + i, n), n); });
  });
}

// Row `row` of a dense matrix = from[i], rounded.
template <typename T>
void write_row(DType dtype, void* to, std::int64_t row, std::int64_t dim, const T* from) {
  with_dtype<T>(dtype, [&](auto* typed) {
    auto* p = static_cast<decltype(typed)>(to) + row * dim;
    for_lanes<T>(dim, [&](std::int64_t i, int n) { store_lanes(p + i, load_lanes<T>(from + i, n), n); });
  });
}

// to += from
template <typename T>
void add(const T* from, std::int64_t dim, T* to) {
  for_lanes<T>(dim, [&](std::int64_t i, int n) {
    store_lanes<T>(to + i, load_lanes<T>(to + i, n) + load_lanes<T>(from + i, n), n);
  });
}

template <typename T>
void forward(const RmsNormForward& p) {
  const std::int64_t ngroups = p.dim / p.group;
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  parallel_for(p.rows, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    const Scratch<T> v(p.dim), gate(p.dim);
    for (std::int64_t row = begin; row < end; ++row) {
      read_row<T>(p.dtype, p.x, row, p.x_stride, p.dim, v);
      if (p.residual) {
        read_row<T>(p.residual_dtype, p.residual, row, p.residual_stride, p.dim, gate);
        add<T>(gate, p.dim, v);
        write_row<T>(p.total_dtype, p.total, row, p.dim, v);
      }
      if (p.z) {
        read_row<T>(p.dtype, p.z, row, p.z_stride, p.dim, gate);
        for_lanes<T>(p.dim, [&](std::int64_t i, int n) {
          const Vec<T> factor = silu(load_lanes<T>(gate + i, n));
          if (p.gate_after) store_lanes<T>(gate + i, factor, n);
          else store_lanes<T>(v + i, load_lanes<T>(v + i, n) * factor, n);
        });
      }
      for (std::int64_t g = 0; g < ngroups; ++g) {
        const std::int64_t first = g * p.group;
        Vec<T> squares(T(0));
        for_lanes<T>(p.group, [&](std::int64_t i, int n) {
          const Vec<T> a = load_lanes<T>(v + first + i, n);
          squares = fma(a, a, squares);
        });
        const T rstd = T(1) / std::sqrt(sum(squares) / static_cast<T>(p.group) + static_cast<T>(p.eps));
        static_cast<T*>(p.rstd)[row * ngroups + g] = rstd;
        for_lanes<T>(p.group, [&](std::int64_t i, int n) {
          const std::int64_t c = first + i;
          Vec<T> y = load_lanes<T>(v + c, n) * Vec<T>(rstd) * load_lanes<T>(weight + c, n);
          if (bias) y = y + load_lanes<T>(bias + c, n);
          if (p.z && p.gate_after) y = y * load_lanes<T>(gate + c, n);
          store_lanes<T>(v + c, y, n);
        });
      }
      write_row<T>(p.dtype, p.y, row, p.dim, v);
    }
  });
}

template <typename T>
void backward(const RmsNormBackward& p) {
  const std::int64_t ngroups = p.dim / p.group;
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  const T* rstds = static_cast<const T*>(p.rstd);

  const std::int64_t wanted = (p.rows + kMaxBlocks - 1) / kMaxBlocks;
  const std::int64_t block = wanted < kMinBlock ? kMinBlock : wanted;
  const std::int64_t nblocks = (p.rows + block - 1) / block;
  const Scratch<T> parts(2 * nblocks * p.dim);  // dweight and dbias of each block

  parallel_for(nblocks, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    const Scratch<T> v(p.dim), dy(p.dim), z(p.dim), dz(p.dim);
    for (std::int64_t b = begin; b < end; ++b) {
      T* dweight = parts + 2 * b * p.dim;
      T* dbias = dweight + p.dim;
      for (std::int64_t i = 0; i < 2 * p.dim; ++i) dweight[i] = T(0);
      const std::int64_t last = (b + 1) * block < p.rows ? (b + 1) * block : p.rows;
      for (std::int64_t row = b * block; row < last; ++row) {
        read_row<T>(p.total_dtype, p.total, row, p.total_stride, p.dim, v);
        if (p.rest) {
          read_row<T>(p.total_dtype, p.rest, row, p.rest_stride, p.dim, dy);
          add<T>(dy, p.dim, v);
        }
        read_row<T>(p.dtype, p.dy, row, p.dy_stride, p.dim, dy);
        if (p.z) read_row<T>(p.dtype, p.z, row, p.z_stride, p.dim, z);
        for (std::int64_t g = 0; g < ngroups; ++g) {
          const std::int64_t first = g * p.group;
          const Vec<T> rstd(rstds[row * ngroups + g]);
          // dy becomes the gradient of the normalised values, and `along` its part along them.
          Vec<T> along(T(0));
          for_lanes<T>(p.group, [&](std::int64_t i, int n) {
            const std::int64_t c = first + i;
            Vec<T> value = load_lanes<T>(v + c, n), grad = load_lanes<T>(dy + c, n);
            const Vec<T> scale = load_lanes<T>(weight + c, n);
            if (p.z) {
              const Vec<T> logit = load_lanes<T>(z + c, n), factor = silu(logit);
              if (p.gate_after) {
                Vec<T> ungated = value * rstd * scale;
                if (bias) ungated = ungated + load_lanes<T>(bias + c, n);
                store_lanes<T>(dz + c, grad * ungated * silu_slope(logit), n);
                grad = grad * factor;
              } else {
                value = value * factor;
              }
            }
            const Vec<T> normal = value * rstd;
            store_lanes<T>(dweight + c, fma(grad, normal, load_lanes<T>(dweight + c, n)), n);
            store_lanes<T>(dbias + c, load_lanes<T>(dbias + c, n) + grad, n);
            grad = grad * scale;
            along = fma(grad, normal, along);
            store_lanes<T>(dy + c, grad, n);
          });
          const Vec<T> mean(sum(along) / static_cast<T>(p.group));
          for_lanes<T>(p.group, [&](std::int64_t i, int n) {
            const std::int64_t c = first + i;
            const Vec<T> total = load_lanes<T>(v + c, n), grad = load_lanes<T>(dy + c, n);
            if (p.z && !p.gate_after) {
              const Vec<T> logit = load_lanes<T>(z + c, n), factor = silu(logit);
              const Vec<T> dv = fnma(total * factor * rstd, mean, grad) * rstd;
              store_lanes<T>(dz + c, dv * total * silu_slope(logit), n);
              store_lanes<T>(dy + c, dv * factor, n);
            } else {
              store_lanes<T>(dy + c, fnma(total * rstd, mean, grad) * rstd, n);
            }
          });
        }
        if (p.dtotal) {
          read_row<T>(p.total_dtype, p.dtotal, row, p.dtotal_stride, p.dim, v);
          add<T>(v, p.dim, dy);
        }
        write_row<T>(p.total_dtype, p.dx, row, p.dim, dy);
        if (p.z) write_row<T>(p.dtype, p.dz, row, p.dim, dz);
      }
    }
  });

  for (std::int64_t i = 0; i < p.dim; ++i) {
    T dweight(0), dbias(0);
    for (std::int64_t b = 0; b < nblocks; ++b) {
      dweight += parts[2 * b * p.dim + i];
      dbias += parts[(2 * b + 1) * p.dim + i];
    }
    static_cast<T*>(p.dweight)[i] = dweight;
    if (p.dbias) static_cast<T*>(p.dbias)[i] = dbias;
  }
}

}  // namespace

void rms_norm_forward(const RmsNormForward& p) {
  if (p.dtype == DType::float64) forward<double>(p);
  else forward<float>(p);
}

void rms_norm_backward(const RmsNormBackward& p) {
  if (p.dtype == DType::float64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
