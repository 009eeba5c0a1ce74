// Kruskal's rule: edges sorted by weight, digit by digit, each taken that joins two parts. Threads share the rows.
#include "cpu/minimum_spanning_tree.h"

#include <cstring>

#include "cpu/parallel.h"

namespace ssmkit::SSMKIT_CAPABILITY {
namespace {

constexpr int kDigit = 11;  // bits

// Numbers in the order of the weights: a negative one has all its bits turned, any other its sign.
std::uint32_t key(float weight) {
  if (weight != weight) return ~std::uint32_t{0};
  weight += 0.0f;  // -0 becomes 0
  std::uint32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return bits >> 31 ? ~bits : bits | std::uint32_t{1} << 31;
}
std::uint64_t key(double weight) {
  if (weight != weight) return ~std::uint64_t{0};
  weight += 0.0;
  std::uint64_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return bits >> 63 ? ~bits : bits | std::uint64_t{1} << 63;
}

template <typename T> struct KeyOf { using type = std::uint32_t; };
template <> struct KeyOf<double> { using type = std::uint64_t; };

template <typename Key>
struct Edge {
  Key key;
  std::int32_t index;
};

// Sorts by key, equal keys as they stand; the result lies in one of the two arrays.
template <typename Key>
Edge<Key>* sorted(Edge<Key>* from, Edge<Key>* to, std::int64_t count) {
  for (int shift = 0; shift < static_cast<int>(8 * sizeof(Key)); shift += kDigit) {
    std::int64_t start[1 << kDigit] = {};
    const auto digit = [&](const Edge<Key>& edge) { return edge.key >> shift & ((1 << kDigit) - 1); };
    for (std::int64_t i = 0; i < count; ++i) ++start[digit(from[i])];
    std::int64_t before = 0;
    for (std::int64_t& entry : start) {
      const std::int64_t here = entry;
      entry = before, before += here;
    }
    for (std::int64_t i = 0; i < count; ++i) to[start[digit(from[i])]++] = from[i];
    Edge<Key>* const swapped = from;
    from = to, to = swapped;
  }
  return from;
}

std::int32_t part_of(std::int32_t* part, std::int32_t token) {
  while (part[token] != token) token = part[token] = part[part[token]];
  return token;
}

// Neighbours in the tree: those of token v are ends[first[v]] to ends[first[v + 1] - 1].
struct Neighbours {
  std::int32_t* first;  // (seqlen + 1,)
  std::int32_t* ends;   // (2 (seqlen - 1),)
};

// Memory of one thread.
template <typename T>
struct Memory {
  using Key = typename KeyOf<T>::type;
  std::int64_t seqlen, nedges;
  Scratch<Edge<Key>> edges{nedges}, spare{nedges};
  Scratch<std::int32_t> part{seqlen}, first{seqlen + 1}, other_first{seqlen + 1}, next{seqlen}, taken{2 * seqlen};
  Scratch<std::int32_t> ends{2 * seqlen}, other_ends{2 * seqlen};

  // The tree's edges as pairs of tokens in `taken`; how many.
  std::int64_t span(const T* weights, const std::int32_t* pairs) {
    for (std::int64_t e = 0; e < nedges; ++e) edges[e] = {key(weights[e]), static_cast<std::int32_t>(e)};
    const Edge<Key>* const order = sorted<Key>(edges, spare, nedges);
    for (std::int64_t v = 0; v < seqlen; ++v) part[v] = static_cast<std::int32_t>(v);
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < nedges && count + 1 < seqlen; ++i) {
      const std::int32_t u = pairs[2 * order[i].index], v = pairs[2 * order[i].index + 1];
      const std::int32_t p = part_of(part, u), q = part_of(part, v);
      if (p == q) continue;
      // halving paths alone keeps them short; the lower token leads its part
      if (p < q) part[q] = p;
      else part[p] = q;
      taken[2 * count] = u, taken[2 * count + 1] = v;
      ++count;
    }
    return count;
  }

  // Every token's neighbours in ascending order: tokens handed out in turn to their neighbours in any order.
  Neighbours neighbours() {
    const std::int64_t arcs = 2 * (seqlen - 1);
    for (std::int64_t v = 0; v <= seqlen; ++v) first[v] = 0;
    for (std::int64_t i = 0; i < arcs; ++i) ++first[taken[i] + 1];
    for (std::int64_t v = 0; v < seqlen; ++v) first[v + 1] += first[v], next[v] = first[v];
    for (std::int64_t i = 0; i < arcs; ++i) other_ends[next[taken[i]]++] = taken[i ^ 1];
    for (std::int64_t v = 0; v < seqlen; ++v) next[v] = first[v];
    for (std::int64_t v = 0; v < seqlen; ++v)
      for (std::int32_t i = first[v]; i < first[v + 1]; ++i)
        ends[next[other_ends[i]]++] = static_cast<std::int32_t>(v);
    return {first, ends};
  }

  void walk(const Neighbours& tree, std::int64_t root, std::int32_t* order, std::int32_t* parent) const {
    order[0] = static_cast<std::int32_t>(root), parent[0] = 0;
    std::int64_t found = 1;
    for (std::int64_t position = 0; position < seqlen; ++position) {
      const std::int32_t token = order[position], above = position ? order[parent[position]] : -1;
      for (std::int32_t i = tree.first[token]; i < tree.first[token + 1]; ++i) {
        if (tree.ends[i] == above) continue;
        order[found] = tree.ends[i], parent[found] = static_cast<std::int32_t>(position);
        ++found;
      }
    }
  }
};

template <typename T>
std::int64_t spanning_tree(const MinimumSpanningTreeParams& p) {
  std::int64_t joined = p.seqlen - 1;  // edges of a row's tree; the same for all rows
  if (p.batch == 0 || p.seqlen == 0) return 0;
  parallel_for(p.batch, p.threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    Memory<T> memory{p.seqlen, p.nedges};
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t count = memory.span(static_cast<const T*>(p.weights) + row * p.nedges, p.edges);
      if (count + 1 < p.seqlen) {
        if (thread == 0) joined = count;
        return;
      }
      memory.walk(memory.neighbours(), p.root, p.order + row * p.seqlen, p.parent + row * p.seqlen);
    }
  });
  return p.seqlen - joined;
}

}  // namespace

std::int64_t minimum_spanning_tree(const MinimumSpanningTreeParams& p) {
  return p.dtype == DType::float64 ? spanning_tree<double>(p) : spanning_tree<float>(p);
}

}  // namespace ssmkit::SSMKIT_CAPABILITY
