// minimum_spanning_tree against Prim's rule, which grows one part by the least edge that leaves it.
#include "cpu/minimum_spanning_tree.h"

#include <algorithm>
#include <utility>

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Pairs = std::vector<std::pair<std::int32_t, std::int32_t>>;

// A NaN above all numbers, then by weight, then by index.
bool less(const std::vector<double>& weights, std::size_t i, std::size_t j) {
  const bool i_nan = std::isnan(weights[i]), j_nan = std::isnan(weights[j]);
  if (i_nan != j_nan) return j_nan;
  if (!i_nan && weights[i] != weights[j]) return weights[i] < weights[j];
  return i < j;
}

Pairs by_definition(const std::vector<double>& weights, const Pairs& edges, std::int64_t seqlen) {
  std::vector<bool> inside(seqlen);
  inside[0] = true;
  Pairs chosen;
  while (true) {
    std::size_t best = edges.size();
    for (std::size_t e = 0; e < edges.size(); ++e)
      if (inside[edges[e].first] != inside[edges[e].second] && (best == edges.size() || less(weights, e, best)))
        best = e;
    if (best == edges.size()) return chosen;
    inside[edges[best].first] = inside[edges[best].second] = true;
    chosen.push_back(std::minmax(edges[best].first, edges[best].second));
  }
}

void run(DType dtype, std::int64_t batch, std::int64_t seqlen, const Pairs& edges, double levels, int threads) {
  const std::int64_t nedges = static_cast<std::int64_t>(edges.size());
  Tensor weights(dtype, batch, nedges);
  std::vector<double> numbers(batch * nedges);
  for (double& number : numbers) number = std::floor(testing::uniform() * levels) / levels;
  for (std::size_t i = 0; i < numbers.size(); i += 17) numbers[i] = i % 2 ? std::nan("") : -0.0;
  weights.set(numbers);
  std::vector<std::int32_t> ends, order(batch * seqlen), parent(batch * seqlen);
  for (const auto& [u, v] : edges) ends.push_back(u), ends.push_back(v);
  MinimumSpanningTreeParams p;
  p.dtype = dtype, p.threads = threads, p.batch = batch, p.nedges = nedges, p.seqlen = seqlen, p.root = seqlen / 2;
  p.weights = weights.data(), p.edges = ends.data(), p.order = order.data(), p.parent = parent.data();
  const std::int64_t parts = SSMKIT_CPU(minimum_spanning_tree)(p);
  if (batch == 0 || seqlen == 0) return;
  numbers = weights.values();
  for (std::int64_t row = 0; row < batch; ++row) {
    const std::vector<double> own(numbers.begin() + row * nedges, numbers.begin() + (row + 1) * nedges);
    Pairs expected = by_definition(own, edges, seqlen), actual;
    const std::int64_t reached = static_cast<std::int64_t>(expected.size());
    if (reached < seqlen - 1) {
      if (parts < 2) testing::fail("parts that are not joined");
      return;
    }
    if (parts != 1) testing::fail("parts " + std::to_string(parts));
    const std::int32_t* const tokens = order.data() + row * seqlen;
    const std::int32_t* const above = parent.data() + row * seqlen;
    if (tokens[0] != p.root || above[0] != 0) testing::fail("root");
    for (std::int64_t i = 1; i < seqlen; ++i) {
      const bool sibling = above[i] == above[i - 1] && i > 1;
      if (above[i] >= i || above[i] < above[i - 1] || (sibling && tokens[i] < tokens[i - 1]))
        return testing::fail("not breadth first at " + std::to_string(i));
      actual.push_back(std::minmax(tokens[i], tokens[above[i]]));
    }
    std::sort(expected.begin(), expected.end()), std::sort(actual.begin(), actual.end());
    if (actual != expected) testing::fail("another tree");
  }
}

Pairs grid(std::int32_t rows, std::int32_t cols) {
  Pairs edges;
  for (std::int32_t i = 0; i < rows * cols; ++i) {
    if (i + cols < rows * cols) edges.emplace_back(i, i + cols);
    if (i % cols + 1 < cols) edges.emplace_back(i, i + 1);
  }
  return edges;
}

const testing::Case kGrids("images with many and with few equal weights", [] {
  for (DType dtype : {DType::float32, DType::float64})
    for (double levels : {1.0, 5.0, 1e6})
      for (int threads : {1, 3}) {
        run(dtype, 3, 20, grid(4, 5), levels, threads);
        run(dtype, 2, 7, grid(1, 7), levels, threads);
        run(dtype, 2, 9, grid(9, 1), levels, threads);
        run(dtype, 1, 323, grid(17, 19), levels, threads);
      }
});

const testing::Case kGraphs("loops, parallel edges, one token, none, parts left alone", [] {
  run(DType::float32, 2, 1, {}, 4.0, 1);
  run(DType::float32, 2, 1, {{0, 0}}, 4.0, 1);
  run(DType::float32, 2, 0, {}, 4.0, 1);
  run(DType::float32, 0, 5, grid(1, 5), 4.0, 2);
  run(DType::float32, 2, 4, {{0, 1}, {1, 0}, {2, 2}, {3, 2}, {1, 3}, {2, 0}, {0, 1}}, 3.0, 2);
  run(DType::float32, 2, 5, {{0, 1}, {3, 4}}, 3.0, 2);
  run(DType::float32, 2, 3, {}, 3.0, 2);
});

}  // namespace
