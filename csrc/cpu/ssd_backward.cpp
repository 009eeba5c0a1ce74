#include "cpu/ssd.h"
#include "cpu/ssd_backward_run.h"
#include "cpu/ssd_plan.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

// Which thread takes a unit under parallel_for's split.
inline std::int64_t thread_of(std::int64_t unit, std::int64_t units, std::int64_t threads) {
  const std::int64_t parts = units < threads ? units : threads;
  return ((unit + 1) * parts - 1) / units;
}

// How many threads take the `count` units from `unit` on.
inline std::int64_t threads_of(std::int64_t unit, std::int64_t count, std::int64_t units, std::int64_t threads) {
  return thread_of(unit + count - 1, units, threads) - thread_of(unit, units, threads) + 1;
}

// out[i] = parts[0][i] + parts[1][i] + ..., in this order
template <typename S>
void add_parts(const SsdBackward& p, void* out, const acc_t<S>* parts, std::int64_t part_size, std::int64_t nparts,
               std::int64_t begin, std::int64_t count) {
  using T = acc_t<S>;
  for (std::int64_t i = begin; i < begin + count; i += Vec<T>::size) {
    const int left = static_cast<int>(begin + count - i < Vec<T>::size ? begin + count - i : Vec<T>::size);
    Vec<T> total(T(0));
    for (std::int64_t part = 0; part < nparts; ++part) total += load_upto(parts + part * part_size + i, left);
    if (p.wide)
      store_upto(static_cast<T*>(out) + i, total, left);
    else
      store_upto(static_cast<S*>(out) + i, total, left);
  }
}

// Sums over the parts of the work: numbers that begin with 0, a row of `count` for each part.
class Parts {
 public:
  Parts(std::int64_t parts, std::int64_t count) : parts_(parts), count_(count), data_(parts * count) {
    for (std::int64_t i = 0; i < parts * count; ++i) data_[i] = 0;
  }
  double* at(std::int64_t part, std::int64_t i) const { return data_ + part * count_ + i; }
  template <typename T>
  void total(T* out) const {
    for (std::int64_t i = 0; out && i < count_; ++i) {
      double sum = 0;
      for (std::int64_t part = 0; part < parts_; ++part) sum += *at(part, i);
      out[i] = static_cast<T>(sum);
    }
  }

 private:
  std::int64_t parts_, count_;
  Scratch<double> data_;
};

template <typename S, typename U>
void backward(const SsdBackward& p) {
  using T = acc_t<S>;
  using Run = BackwardRun<S, U>;
  const SsdSizes<T> size(p);
  const std::int64_t state_size = std::int64_t{size.n} * size.p_step, given = std::int64_t{size.n} * size.p;
  const std::int64_t heads_of_all = p.nseq * p.nheads, width = p.ngroups * p.dstate, rows = p.batch * p.seqlen;
  const T* dfinal = static_cast<const T*>(p.dfinal_state);
  T* dinitial = static_cast<T*>(p.dinitial_state);
  const SsdItems items(p);
  const bool by_chunk = heads_of_all > 0 && items.better_than_heads();
  const std::int64_t per_group = p.ngroups ? p.nheads / p.ngroups : 0;

  // parts of dB and dC: one for each thread that has heads of a group
  std::int64_t nparts = 1;
  for (std::int64_t u = 0; !by_chunk && u < heads_of_all; u += per_group) {
    const std::int64_t spread = threads_of(u, per_group, heads_of_all, p.threads);
    if (spread > nparts) nparts = spread;
  }
  Scratch<T> dB(nparts * rows * width), dC(nparts * rows * width);
  const std::int64_t sums_of = by_chunk ? items.count() : p.nseq;
  const Parts dA(sums_of, p.nheads), dbias(sums_of, p.nheads), dD(sums_of, p.dD ? p.nheads * size.p : 0);
  const auto sums = [&](std::int64_t sum, std::int64_t head, std::int64_t part, bool first) {
    return Sums<T>{dB + part * rows * width, dC + part * rows * width, first, dA.at(sum, head),
                   p.dD ? dD.at(sum, head * size.p) : nullptr, dbias.at(sum, head)};
  };

  if (!by_chunk) {
    for_runs<T>(p, heads_at_once(size), [&](std::int64_t s, int group, std::int64_t head, int heads, int thread, bool first) {
      Scratch<T> dstates(heads * state_size), decays(heads);
      Run run(p, heads);
      const SsdSequence sequence(p, s);
      const std::int64_t unit = s * p.nheads + head;
      const std::int64_t part = thread - thread_of(s * p.nheads + group * per_group, heads_of_all, p.threads);
      for (int i = 0; i < heads; ++i)
        read_state<T>(dstates + i * state_size, dfinal ? dfinal + (unit + i) * given : nullptr, size);
      run.walk(sequence, 0, sequence.chunks(p.chunk), group, head, heads, dstates, Work::both, decays,
               sums(s, head, part, first));
      if (dinitial)
        for (int i = 0; i < heads; ++i) write_state<T>(dinitial + (unit + i) * given, dstates + i * state_size, size);
    });
  } else {
    // as in forward, with the states' gradients chained from the last chunk to the first
    Scratch<T> dstates(items.count() * p.nheads * state_size), decays(items.count() * p.nheads);
    const auto each_chunk = [&](Work work) {
      items.each([&] { return Run(p, static_cast<int>(per_group)); },
                 [&](Run& run, std::int64_t item, const SsdSequence& sequence, std::int64_t index, int group) {
                   const std::int64_t head = group * per_group, at = item * p.nheads + head;
                   if (work == Work::state)
                     for (std::int64_t i = 0; i < per_group; ++i)
                       read_state<T>(dstates + (at + i) * state_size, nullptr, size);
                   run.walk(sequence, index, index + 1, group, head, static_cast<int>(per_group),
                            dstates + at * state_size, work, decays + at, sums(item, head, 0, true));
                 });
    };
    each_chunk(Work::state);
    parallel_for(heads_of_all, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
      Scratch<T> carried(state_size);
      for (std::int64_t unit = begin; unit < end; ++unit) {
        const std::int64_t s = unit / p.nheads, head = unit % p.nheads;
        read_state<T>(carried, dfinal ? dfinal + unit * given : nullptr, size);
        for (std::int64_t item = items.begin(s + 1); item-- > items.begin(s);)
          pass_on<T>(carried, dstates + (item * p.nheads + head) * state_size, decays[item * p.nheads + head], size);
        if (dinitial) write_state<T>(dinitial + unit * given, carried, size);
      }
    });
    each_chunk(Work::outputs);
  }

  parallel_for(p.nseq * p.ngroups, p.threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t item = begin; item < end; ++item) {
      const SsdSequence sequence(p, item / p.ngroups);
      const std::int64_t group = item % p.ngroups;
      const std::int64_t u = item * per_group;
      const std::int64_t used = by_chunk ? 1 : per_group ? threads_of(u, per_group, heads_of_all, p.threads) : 0;
      for (std::int64_t row = sequence.row; row < sequence.row + sequence.length; ++row) {
        const std::int64_t at = row * width + group * p.dstate;
        add_parts<S>(p, p.dB, dB, rows * width, used, at, p.dstate);
        add_parts<S>(p, p.dC, dC, rows * width, used, at, p.dstate);
      }
    }
  });
  dA.total(static_cast<T*>(p.dA)), dD.total(static_cast<T*>(p.dD)), dbias.total(static_cast<T*>(p.ddt_bias));
}

}  // namespace

void ssd_backward(const SsdBackward& p) {
#if defined(SSMKIT_BF16)
  return p.dtype == DType::bfloat16 ? backward<bfloat16, Pair>(p) : avx512::ssd_backward(p);
#else
  switch (p.dtype) {
    case DType::float32: return backward<float, float>(p);
    case DType::float64: return backward<double, double>(p);
    case DType::bfloat16: return backward<bfloat16, float>(p);
    case DType::float16: return backward<float16, float>(p);
    default: return;
  }
#endif
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
