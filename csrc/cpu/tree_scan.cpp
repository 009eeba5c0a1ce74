// What is computed on the way is kept in the output itself where that has the precision, else by position, in memory of
// the thread's own. Children follow one another in the tables, so both sweeps meet the tokens in the order of the tables,
// and their rows are asked for some positions before their use.
//
// Threads share the rows of the batch x blocks of columns.
#include "cpu/tree_scan.h"

#include <type_traits>

#include "cpu/linear_scan_lanes.h"
#include "cpu/parallel.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Positions whose rows are on their way, to be read or written, while one is at work: their place in memory follows no
// rule that the hardware could guess. On an AMD EPYC 9004 (Zen 4) 16 is faster than 8 and 4.
constexpr std::int64_t kAhead = 16;

// Columns of a block at most. Whole rows are best even where the states of a block would fit a cache: backward of
// (1, 224 x 224, 192) takes there half the time of blocks of 32 columns.
constexpr std::int64_t kColumns = 1024;

// Rows of one sample from the first column of a block on: by position, or by token if there is an order.
template <typename T>
struct Rows {
  T* base;
  std::int64_t stride;
  const std::int32_t* order;

  SSMKIT_INLINE T* operator[](std::int64_t position) const {
    return base + (order ? order[position] : position) * stride;
  }
};

// One tree and one block of columns.
struct Block {
  std::int64_t seqlen, dim, sample, column, width;
  const std::int32_t* order;
  const std::int32_t* parent;

  template <typename T>
  Rows<T> by_token(T* base, std::int64_t stride) const {
    return {base + sample * seqlen * stride + column, stride, order};
  }
  template <typename T>
  Rows<T> by_position(T* base) const {
    return {base + sample * seqlen * dim + column, dim, nullptr};
  }
};

// Where a state of type T is kept: in `output` if its numbers are such, else in `memory`.
template <typename T, typename Out>
Rows<T> state_in(const Rows<Out>& output, T* memory, std::int64_t width) {
  if constexpr (std::is_same_v<T, Out>) return output;
  else return {memory, width, nullptr};
}

template <typename T>
SSMKIT_INLINE void fetch(const T* row, std::int64_t width) {
  const char* p = reinterpret_cast<const char*>(row);
  for (std::int64_t byte = 0; byte < width * static_cast<std::int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(p + byte, 0, 2);
}

// out = own + the sum over kChildren children of a xi
template <int kChildren, typename In, typename Own, typename T>
SSMKIT_INLINE void gather(std::int64_t width, const Own* own, const In* const* a, const T* const* xi, T* out) {
  for_slices<4, T>(Columns{0, width}, [&](auto slice) {
    for (int v = 0; v < slice.kVectors; ++v) {
      Vec<T> x = slice.get(own, v);
      for (int c = 0; c < kChildren; ++c) x = fma(slice.get(a[c], v), slice.get(xi[c], v), x);
      slice.put(out, v, x);
    }
  });
}

// From the leaves to the root: state_p = own_p + sum of a_c state_c.
template <typename In, typename T>
void up(const Block& block, Rows<const In> a, Rows<const In> own, Rows<T> state) {
  std::int64_t child = block.seqlen - 1;  // the last position that was not gathered yet
  for (std::int64_t position = block.seqlen - 1; position >= 0; --position) {
    if (position >= kAhead) {
      fetch(own[position - kAhead], block.width);
      fetch(state[position - kAhead], block.width);
    }
    const std::int64_t last = child;
    for (; child > 0 && block.parent[child] == position; --child)
      if (child > kAhead) fetch(a[child - kAhead], block.width);
    const std::int64_t children = last - child;
    const In* decay[4];
    const T* xi[4];
    for (std::int64_t c = 0; c < 4 && c < children; ++c) decay[c] = a[child + 1 + c], xi[c] = state[child + 1 + c];
    T* const out = state[position];
    switch (children) {
      case 0: gather<0>(block.width, own[position], decay, xi, out); break;
      case 1: gather<1>(block.width, own[position], decay, xi, out); break;
      case 2: gather<2>(block.width, own[position], decay, xi, out); break;
      case 3: gather<3>(block.width, own[position], decay, xi, out); break;
      default: gather<4>(block.width, own[position], decay, xi, out);
    }
    for (std::int64_t c = 4; c < children; ++c) {
      decay[0] = a[child + 1 + c], xi[0] = state[child + 1 + c];
      gather<1>(block.width, static_cast<const T*>(out), decay, xi, out);
    }
  }
}

template <typename In>
void forward(const TreeScanForward& p, const Block& block, acc_t<In>* memory) {
  using T = acc_t<In>;
  const auto a = block.by_token(static_cast<const In*>(p.a), p.a_stride);
  const auto h = block.by_token(static_cast<In*>(p.h), p.dim);
  const Rows<T> state = state_in<T>(h, memory, block.width);
  const Rows<T> xi = p.xi ? block.by_position(static_cast<T*>(p.xi)) : state;
  up(block, a, block.by_token(static_cast<const In*>(p.b), p.b_stride), xi);
  for (std::int64_t position = 0; position < p.seqlen; ++position) {
    if (position + kAhead < p.seqlen) {
      if (p.both) fetch(a[position + kAhead], block.width);
      fetch(xi[position + kAhead], block.width);
      fetch(h[position + kAhead], block.width);
    }
    const In* const decays = a[position];
    const T* const rising = xi[position];
    const T* const above = state[block.parent[position]];
    T* const own = state[position];
    In* const out = h[position];
    const bool down = p.both && position > 0;
    for_slices<4, T>(Columns{0, block.width}, [&](auto slice) {
      for (int v = 0; v < slice.kVectors; ++v) {
        Vec<T> x = slice.get(rising, v);
        if (down) {
          const Vec<T> decay = slice.get(decays, v);
          x = fma(decay, fnma(decay, x, slice.get(above, v)), x);
        }
        slice.put(own, v, x);
        if constexpr (!std::is_same_v<T, In>) slice.put(out, v, x);
      }
    });
  }
}

// db is the same operator on dh; h is computed again on the way down:
// da_v = gxi_v (h_parent - a xi_v) + xi_v (db_parent - a gxi_v).
template <typename In>
void backward_both(const TreeScanBackward& p, const Block& block, acc_t<In>* memory) {
  using T = acc_t<In>;
  const auto a = block.by_token(static_cast<const In*>(p.a), p.a_stride);
  const auto xi = block.by_position(static_cast<const T*>(p.xi));
  const auto da = block.by_token(static_cast<In*>(p.da), p.dim), db = block.by_token(static_cast<In*>(p.db), p.dim);
  const Rows<T> gradient = state_in<T>(db, memory + p.seqlen * block.width, block.width);
  const Rows<T> state{memory, block.width, nullptr};
  up(block, a, block.by_token(static_cast<const In*>(p.dh), p.dh_stride), gradient);
  for (std::int64_t position = 0; position < p.seqlen; ++position) {
    if (position + kAhead < p.seqlen) {
      fetch(a[position + kAhead], block.width);
      fetch(xi[position + kAhead], block.width);
      fetch(gradient[position + kAhead], block.width);
      fetch(da[position + kAhead], block.width);
    }
    const In* const decays = a[position];
    const T* const rising = xi[position];
    const T* const above = state[block.parent[position]];
    const T* const gabove = gradient[block.parent[position]];
    T* const own = state[position];
    T* const gown = gradient[position];
    In* const da_row = da[position];
    In* const db_row = db[position];
    for_slices<4, T>(Columns{0, block.width}, [&](auto slice) {
      for (int v = 0; v < slice.kVectors; ++v) {
        Vec<T> x = slice.get(rising, v), g = slice.get(gown, v), weight(T(0));
        if (position > 0) {
          const Vec<T> decay = slice.get(decays, v);
          const Vec<T> outside = fnma(decay, x, slice.get(above, v));
          const Vec<T> goutside = fnma(decay, g, slice.get(gabove, v));
          weight = fma(g, outside, x * goutside);
          x = fma(decay, outside, x);
          g = fma(decay, goutside, g);
        }
        slice.put(own, v, x);
        slice.put(gown, v, g);
        slice.put(da_row, v, weight);
        if constexpr (!std::is_same_v<T, In>) slice.put(db_row, v, g);
      }
    });
  }
}

// The first sweep alone: db_v = dh_v + a_v db_parent, da_v = db_parent xi_v.
template <typename In>
void backward_up(const TreeScanBackward& p, const Block& block, acc_t<In>* memory) {
  using T = acc_t<In>;
  const auto a = block.by_token(static_cast<const In*>(p.a), p.a_stride);
  const auto dh = block.by_token(static_cast<const In*>(p.dh), p.dh_stride);
  const auto xi = block.by_position(static_cast<const T*>(p.xi));
  const auto da = block.by_token(static_cast<In*>(p.da), p.dim), db = block.by_token(static_cast<In*>(p.db), p.dim);
  const Rows<T> gradient = state_in<T>(db, memory, block.width);
  for (std::int64_t position = 0; position < p.seqlen; ++position) {
    if (position + kAhead < p.seqlen) {
      fetch(a[position + kAhead], block.width);
      fetch(dh[position + kAhead], block.width);
      fetch(xi[position + kAhead], block.width);
      fetch(da[position + kAhead], block.width);
      fetch(db[position + kAhead], block.width);
    }
    const In* const decays = a[position];
    const In* const given = dh[position];
    const T* const rising = xi[position];
    const T* const gabove = gradient[block.parent[position]];
    T* const gown = gradient[position];
    In* const da_row = da[position];
    In* const db_row = db[position];
    for_slices<4, T>(Columns{0, block.width}, [&](auto slice) {
      for (int v = 0; v < slice.kVectors; ++v) {
        Vec<T> g = slice.get(given, v), weight(T(0));
        if (position > 0) {
          const Vec<T> reaching = slice.get(gabove, v);
          g = fma(slice.get(decays, v), reaching, g);
          weight = reaching * slice.get(rising, v);
        }
        slice.put(gown, v, g);
        slice.put(da_row, v, weight);
        if constexpr (!std::is_same_v<T, In>) slice.put(db_row, v, g);
      }
    });
  }
}

// work(block, memory) for every tree and block of columns; memory is `arrays` x seqlen x width numbers.
template <typename T, typename P, typename Work>
void for_blocks(const P& p, int arrays, const Work& work) {
  if (p.batch == 0 || p.seqlen == 0 || p.dim == 0) return;
  constexpr std::int64_t V = Vec<T>::size;
  const std::int64_t vectors = (p.dim + V - 1) / V;
  std::int64_t blocks = (p.dim + kColumns - 1) / kColumns;
  if (p.batch * blocks < p.threads) blocks = (p.threads + p.batch - 1) / p.batch;
  if (blocks > vectors) blocks = vectors;
  const std::int64_t widest = (vectors + blocks - 1) / blocks * V;
  parallel_for(p.batch * blocks, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    const Scratch<T> memory(arrays * p.seqlen * (widest < p.dim ? widest : p.dim));
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t sample = i / blocks, part = i % blocks;
      const std::int64_t column = vectors * part / blocks * V, next = vectors * (part + 1) / blocks * V;
      const std::int64_t width = (next < p.dim ? next : p.dim) - column;
      const std::int64_t tree = sample * p.tree_stride;
      work(Block{p.seqlen, p.dim, sample, column, width, p.order + tree, p.parent + tree}, static_cast<T*>(memory));
    }
  });
}

// call(a null pointer to the element type)
template <typename Call>
void with_element(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::float64: return call(static_cast<double*>(nullptr));
    case DType::bfloat16: return call(static_cast<bfloat16*>(nullptr));
    case DType::float16: return call(static_cast<float16*>(nullptr));
    default: return call(static_cast<float*>(nullptr));
  }
}

}  // namespace

void tree_scan_forward(const TreeScanForward& p) {
  with_element(p.dtype, [&](auto* element) {
    using In = std::remove_pointer_t<decltype(element)>;
    using T = acc_t<In>;
    for_blocks<T>(p, std::is_same_v<T, In> ? 0 : 1, [&](const Block& block, T* memory) {
      forward<In>(p, block, memory);
    });
  });
}

void tree_scan_backward(const TreeScanBackward& p) {
  with_element(p.dtype, [&](auto* element) {
    using In = std::remove_pointer_t<decltype(element)>;
    using T = acc_t<In>;
    for_blocks<T>(p, (p.both ? 1 : 0) + (std::is_same_v<T, In> ? 0 : 1), [&](const Block& block, T* memory) {
      if (p.both) backward_both<In>(p, block, memory);
      else backward_up<In>(p, block, memory);
    });
  });
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
