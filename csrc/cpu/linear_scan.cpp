// A slice of a few vectors of channels keeps its states in registers while a tile of tokens goes by.
#include "cpu/linear_scan.h"

#include <type_traits>

#include "cpu/linear_scan_division.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// From the first position to the last.
template <class Kind, bool kConstant>
struct Forward {
  using K = Kind;
  using In = typename K::In;
  using T = typename K::T;
  using V = Vec<T>;
  using A = std::conditional_t<kConstant, T, In>;
  static constexpr bool kAdjoint = false;

  const LinearScanForward& p;
  Walk walk;
  std::int64_t width = p.dim * K::kReals;
  const A* a = static_cast<const A*>(p.a);
  const In* b = static_cast<const In*>(p.b);
  std::int64_t a_stride = p.a_stride * K::kReals, b_stride = p.b_stride * K::kReals;
  In* h = static_cast<In*>(p.h);
  T* states = static_cast<T*>(p.states);

  const T* given(std::int64_t s) const {
    return p.initial_state ? static_cast<const T*>(p.initial_state) + s * width : nullptr;
  }
  T* result(std::int64_t s) const { return static_cast<T*>(p.final_state) + s * width; }

  // state <- a state + b over the positions [lo, hi), writing h
  template <class Slice>
  SSMKIT_INLINE void output(const Task<T>& task, std::int64_t lo, std::int64_t hi, Slice slice, T* state) const {
    constexpr int n = Slice::kVectors;
    V x[n], decay[n];
    for (int v = 0; v < n; ++v) x[v] = slice.get(state, v);
    if constexpr (kConstant)
      for (int v = 0; v < n; ++v) decay[v] = slice.get(a, v);
    for (std::int64_t position = lo; position < hi; ++position) {
      const std::int64_t row = walk.row(task.sequence, position);
      const std::uint8_t flag = walk.flags ? walk.flags[row] : 0;
      if (const std::int64_t ahead = task.ahead(row); ahead >= 0) {
        slice.fetch(b + ahead * b_stride), slice.fetch(h + ahead * width);
        if constexpr (!kConstant) slice.fetch(a + ahead * a_stride);
      }
      if (flag & kRestart)
        for (int v = 0; v < n; ++v) x[v] = V(T(0));
      if (!(flag & kPad)) {
        for (int v = 0; v < n; ++v) {
          if constexpr (!kConstant) decay[v] = slice.get(a + row * a_stride, v);
          x[v] = K::step(decay[v], x[v], slice.get(b + row * b_stride, v));
        }
      }
      for (int v = 0; v < n; ++v) slice.put(h + row * width, v, x[v]);
      if (states)
        for (int v = 0; v < n; ++v) slice.put(states + row * width, v, x[v]);
    }
    for (int v = 0; v < n; ++v) slice.put(state, v, x[v]);
  }

  // The positions [lo, hi) as a map: product <- a product, end <- a end + b
  template <class Slice>
  SSMKIT_INLINE void carry(const Sequence& sequence, std::int64_t lo, std::int64_t hi, Slice slice, T* product,
                           T* end) const {
    constexpr int n = Slice::kVectors;
    V P[n], E[n], decay[n];
    for (int v = 0; v < n; ++v) P[v] = K::one(), E[v] = V(T(0));
    if constexpr (kConstant)
      for (int v = 0; v < n; ++v) decay[v] = slice.get(a, v);
    for (std::int64_t position = lo; position < hi; ++position) {
      const std::int64_t row = walk.row(sequence, position);
      const std::uint8_t flag = walk.flags ? walk.flags[row] : 0;
      if (flag & kRestart)
        for (int v = 0; v < n; ++v) P[v] = E[v] = V(T(0));
      if (flag & kPad) continue;
      for (int v = 0; v < n; ++v) {
        if constexpr (!kConstant) decay[v] = slice.get(a + row * a_stride, v);
        P[v] = K::step(decay[v], P[v], V(T(0)));
        E[v] = K::step(decay[v], E[v], slice.get(b + row * b_stride, v));
      }
    }
    for (int v = 0; v < n; ++v) slice.put(product, v, P[v]), slice.put(end, v, E[v]);
  }
};

// From the last position to the first: g <- g + dh, db = g, da = g conj(h_{l-1}), g <- conj(a) g.
template <class Kind, bool kConstant>
struct Backward {
  using K = Kind;
  using In = typename K::In;
  using T = typename K::T;
  using V = Vec<T>;
  using A = std::conditional_t<kConstant, T, In>;
  static constexpr bool kAdjoint = true;

  const LinearScanBackward& p;
  Walk walk;
  T* gradient;  // (nseq, dim): of the states before the first positions
  std::int64_t width = p.dim * K::kReals;
  const A* a = static_cast<const A*>(p.a);
  const A* h = static_cast<const A*>(p.states);
  const In* dh = static_cast<const In*>(p.dh);
  std::int64_t a_stride = p.a_stride * K::kReals, dh_stride = p.dh_stride * K::kReals;
  In* da = static_cast<In*>(p.da);
  In* db = static_cast<In*>(p.db);

  const T* given(std::int64_t s) const {
    return p.dfinal_state ? static_cast<const T*>(p.dfinal_state) + s * width : nullptr;
  }
  T* result(std::int64_t s) const { return gradient + s * width; }

  template <class Slice>
  SSMKIT_INLINE void output(const Task<T>& task, std::int64_t lo, std::int64_t hi, Slice slice, T* state) const {
    constexpr int n = Slice::kVectors;
    V g[n], decay[n], sum[n];
    for (int v = 0; v < n; ++v) g[v] = slice.get(state, v), sum[v] = V(T(0));
    if constexpr (kConstant)
      for (int v = 0; v < n; ++v) decay[v] = slice.get(a, v);
    for (std::int64_t position = hi - 1; position >= lo; --position) {
      const std::int64_t row = walk.row(task.sequence, position);
      const std::uint8_t flag = walk.flags ? walk.flags[row] : 0;
      if (const std::int64_t ahead = task.ahead(row); ahead >= 0) {
        slice.fetch(dh + ahead * dh_stride), slice.fetch(h + ahead * width), slice.fetch(db + ahead * width);
        if constexpr (!kConstant) slice.fetch(a + ahead * a_stride), slice.fetch(da + ahead * width);
      }
      for (int v = 0; v < n; ++v) g[v] += slice.get(dh + row * dh_stride, v);
      const bool real = !(flag & kPad), joined = real && !(flag & kRestart);
      for (int v = 0; v < n; ++v) slice.put(db + row * width, v, real ? g[v] : V(T(0)));

      const auto add_term = [&](int v, V before) {
        const V term = K::times_conj(before, g[v]);
        if constexpr (kConstant) sum[v] += term;
        else slice.put(da + row * width, v, term);
      };
      if (joined && position > 0) {
        const A* before = h + walk.row(task.sequence, position - 1) * width;
        for (int v = 0; v < n; ++v) add_term(v, slice.get(before, v));
      } else if (joined && task.initial) {
        for (int v = 0; v < n; ++v) add_term(v, slice.get(task.initial, v));
      } else if constexpr (!kConstant) {
        for (int v = 0; v < n; ++v) slice.put(da + row * width, v, V(T(0)));
      }

      if (flag & kRestart) {
        for (int v = 0; v < n; ++v) g[v] = V(T(0));
      } else if (real) {
        for (int v = 0; v < n; ++v) {
          if constexpr (!kConstant) decay[v] = slice.get(a + row * a_stride, v);
          g[v] = K::times_conj(decay[v], g[v]);
        }
      }
    }
    for (int v = 0; v < n; ++v) slice.put(state, v, g[v]);
    if constexpr (kConstant)
      for (int v = 0; v < n; ++v) slice.put(task.da, v, slice.get(task.da, v) + sum[v]);
  }

  template <class Slice>
  SSMKIT_INLINE void carry(const Sequence& sequence, std::int64_t lo, std::int64_t hi, Slice slice, T* product,
                           T* end) const {
    constexpr int n = Slice::kVectors;
    V P[n], E[n], decay[n];
    for (int v = 0; v < n; ++v) P[v] = K::one(), E[v] = V(T(0));
    if constexpr (kConstant)
      for (int v = 0; v < n; ++v) decay[v] = slice.get(a, v);
    for (std::int64_t position = hi - 1; position >= lo; --position) {
      const std::int64_t row = walk.row(sequence, position);
      const std::uint8_t flag = walk.flags ? walk.flags[row] : 0;
      for (int v = 0; v < n; ++v) E[v] += slice.get(dh + row * dh_stride, v);
      if (flag & kRestart) {
        for (int v = 0; v < n; ++v) P[v] = E[v] = V(T(0));
      } else if (!(flag & kPad)) {
        for (int v = 0; v < n; ++v) {
          if constexpr (!kConstant) decay[v] = slice.get(a + row * a_stride, v);
          P[v] = K::times_conj(decay[v], P[v]);
          E[v] = K::times_conj(decay[v], E[v]);
        }
      }
    }
    for (int v = 0; v < n; ++v) slice.put(product, v, P[v]), slice.put(end, v, E[v]);
  }
};

template <typename P>
Walk walk_of(const P& p) {
  return {p.seqlen, p.cu_seqlens, nullptr, p.flags, p.reverse};
}

template <class Kind, bool kConstant>
void forward(const LinearScanForward& p) {
  if (p.dim == 0 || p.nseq == 0) return;
  const Forward<Kind, kConstant> pass{p, walk_of(p)};
  Division(pass).run(nullptr);
}

template <class Kind, bool kConstant>
void backward(const LinearScanBackward& p) {
  using T = typename Kind::T;
  const std::int64_t width = p.dim * Kind::kReals;
  if (width == 0) return;
  if (p.nseq == 0) {
    if constexpr (kConstant) sum_rows<T>(nullptr, 0, width, static_cast<T*>(p.da), 1);
    return;
  }
  Scratch<T> unwanted(p.dinitial_state ? 0 : p.nseq * width);
  const Backward<Kind, kConstant> pass{p, walk_of(p), p.dinitial_state ? static_cast<T*>(p.dinitial_state) : unwanted};
  const Division division(pass);
  if constexpr (kConstant) {
    const std::int64_t count = 2 * division.walks() * width;
    Scratch<T> da(count);
    for (std::int64_t i = 0; i < count; ++i) da[i] = T(0);
    division.run(da);
    sum_rows<T>(da, division.walks(), width, static_cast<T*>(p.da), p.threads);
  } else {
    division.run(nullptr);
  }
}

// call(Kind) for the dtype of the inputs
template <typename Call>
void with_kind(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::float32: return call(Kind<float, false>());
    case DType::float64: return call(Kind<double, false>());
    case DType::bfloat16: return call(Kind<bfloat16, false>());
    case DType::float16: return call(Kind<float16, false>());
    case DType::complex64: return call(Kind<float, true>());
    case DType::complex128: return call(Kind<double, true>());
  }
}

}  // namespace

void linear_scan_forward(const LinearScanForward& p) {
  with_kind(p.dtype, [&](auto kind) {
    p.constant_a ? forward<decltype(kind), true>(p) : forward<decltype(kind), false>(p);
  });
}

void linear_scan_backward(const LinearScanBackward& p) {
  with_kind(p.dtype, [&](auto kind) {
    p.constant_a ? backward<decltype(kind), true>(p) : backward<decltype(kind), false>(p);
  });
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
