// tree_scan against its two sweeps written out in double, the gradients by the sums over paths that they are.
#include "cpu/tree_scan.h"

#include <algorithm>

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Numbers = std::vector<double>;

struct Options {
  std::int64_t batch = 2, seqlen = 23, dim = 19;
  DType dtype = DType::float32;
  bool both = true, shared_tree = false;
  // a token's parent is one of the `reach` positions before it, and none before its neighbour's parent
  int reach = 1000, threads = 1;
  std::int64_t padding = 0;
};

// A breadth-first tree under shuffled names.
void draw_tree(const Options& o, std::int32_t* order, std::int32_t* parent) {
  for (std::int64_t p = 0; p < o.seqlen; ++p) order[p] = static_cast<std::int32_t>(p), parent[p] = 0;
  for (std::int64_t p = o.seqlen - 1; p > 0; --p)
    std::swap(order[p], order[static_cast<std::int64_t>((testing::uniform() + 1) / 2 * (p + 1))]);
  for (std::int64_t p = 2; p < o.seqlen; ++p) {
    const std::int64_t least = std::max<std::int64_t>(parent[p - 1], p - o.reach);
    const double drawn = (testing::uniform() + 1) / 2 * static_cast<double>(p - least);
    parent[p] = static_cast<std::int32_t>(least + static_cast<std::int64_t>(drawn));
  }
}

void run(const Options& o) {
  const bool wide = o.dtype == DType::float64;
  const DType state = wide ? DType::float64 : DType::float32;
  const std::int64_t rows = o.batch * o.seqlen, trees = o.shared_tree ? 1 : o.batch;
  Tensor a(o.dtype, rows, o.dim, o.dim + o.padding), b(o.dtype, rows, o.dim, o.dim + 2 * o.padding);
  Tensor dh(o.dtype, rows, o.dim, o.dim + 3 * o.padding), h(o.dtype, rows, o.dim), plain(o.dtype, rows, o.dim);
  Tensor xi(state, rows, o.dim), da(o.dtype, rows, o.dim), db(o.dtype, rows, o.dim);
  a.random(0.3, 0.6), b.random(1.0), dh.random(1.0);
  std::vector<std::int32_t> order(trees * o.seqlen), parent(trees * o.seqlen);
  for (std::int64_t t = 0; t < trees; ++t) draw_tree(o, order.data() + t * o.seqlen, parent.data() + t * o.seqlen);

  TreeScanForward f;
  f.dtype = o.dtype, f.both = o.both, f.threads = o.threads;
  f.batch = o.batch, f.seqlen = o.seqlen, f.dim = o.dim;
  f.a = a.data(), f.a_stride = a.stride(), f.order = order.data(), f.parent = parent.data();
  f.tree_stride = o.shared_tree ? 0 : o.seqlen;
  f.b = b.data(), f.b_stride = b.stride(), f.h = plain.data(), f.xi = nullptr;
  SSMKIT_CPU(tree_scan_forward)(f);
  f.h = h.data(), f.xi = xi.data();
  SSMKIT_CPU(tree_scan_forward)(f);
  TreeScanBackward g;
  static_cast<TreeScanParams&>(g) = f;
  g.dh = dh.data(), g.dh_stride = dh.stride(), g.xi = xi.data(), g.da = da.data(), g.db = db.data();
  SSMKIT_CPU(tree_scan_backward)(g);

  const Numbers a_ = a.values(), b_ = b.values(), dh_ = dh.values();
  Numbers eh(b_.size()), exi(b_.size()), eda(b_.size()), edb(b_.size());
  for (std::int64_t s = 0; s < o.batch; ++s)
    for (std::int64_t d = 0; d < o.dim; ++d) {
      const std::int32_t* const tokens = order.data() + s * f.tree_stride;
      const std::int32_t* const above = parent.data() + s * f.tree_stride;
      const auto at = [&](std::int64_t p) { return (s * o.seqlen + tokens[p]) * o.dim + d; };
      const auto up = [&](const Numbers& own) {
        Numbers sums(o.seqlen);
        for (std::int64_t p = o.seqlen; p-- > 0;) {
          sums[p] += own[at(p)];
          if (p > 0) sums[above[p]] += a_[at(p)] * sums[p];
        }
        return sums;
      };
      const auto down = [&](Numbers sums) {
        for (std::int64_t p = 1; p < o.seqlen; ++p) {
          const double decay = a_[at(p)];
          sums[p] = (1 - decay * decay) * sums[p] + decay * sums[above[p]];
        }
        return sums;
      };
      const Numbers rising = up(b_), whole = down(rising);
      Numbers grising(o.seqlen), gwhole(o.seqlen);
      if (o.both) {
        grising = up(dh_), gwhole = down(grising);
      } else {
        for (std::int64_t p = 0; p < o.seqlen; ++p)
          gwhole[p] = dh_[at(p)] + (p > 0 ? a_[at(p)] * gwhole[above[p]] : 0.0);
      }
      for (std::int64_t p = 0; p < o.seqlen; ++p) {
        eh[at(p)] = o.both ? whole[p] : rising[p];
        exi[(s * o.seqlen + p) * o.dim + d] = rising[p];
        edb[at(p)] = gwhole[p];
        if (p == 0) continue;
        const double decay = a_[at(p)];
        eda[at(p)] = !o.both ? gwhole[above[p]] * rising[p]
                             : grising[p] * (whole[above[p]] - decay * rising[p]) +
                                   rising[p] * (gwhole[above[p]] - decay * grising[p]);
      }
    }
  testing::close("h without xi", plain.values(), eh, o.dtype);
  testing::close("h", h.values(), eh, o.dtype);
  testing::close("xi", xi.values(), exi, state);
  testing::close("da", da.values(), eda, o.dtype);
  testing::close("db", db.values(), edb, o.dtype);
}

const testing::Case kDTypes("every dtype, both sweeps and one", [] {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
    for (bool both : {true, false}) {
      Options o;
      o.dtype = dtype, o.both = both, o.padding = 3;
      run(o);
    }
});

const testing::Case kShapes("odd sizes, chains and bushes", [] {
  for (std::int64_t seqlen : {0, 1, 2, 9, 40})
    for (std::int64_t dim : {0, 1, 16, 67})
      for (int reach : {1, 3, 1000})
        for (bool both : {true, false}) {
          Options o;
          o.seqlen = seqlen, o.dim = dim, o.reach = reach, o.both = both;
          run(o);
        }
});

const testing::Case kThreads("columns and rows shared by threads, one tree for all rows", [] {
  for (std::int64_t batch : {0, 1, 3})
    for (std::int64_t dim : {5, 67, 1100})
      for (bool both : {true, false}) {
        Options o;
        o.batch = batch, o.dim = dim, o.both = both, o.threads = 5, o.shared_tree = true;
        run(o);
      }
});

}  // namespace
