// causal_conv1d_step against the inputs written down one after the other.
#include "cpu/causal_conv1d_step.h"

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Numbers = std::vector<double>;

struct Options {
  std::int64_t batch = 3, seqlen = 1, dim = 21, width = 4, state_len = 3;
  DType dtype = DType::float32, state_dtype = DType::float32, weight_dtype = DType::float32;
  bool silu = true, bias = true;
  std::vector<std::int64_t> seen;
  std::vector<std::int64_t> slots;
  int threads = 1;
};

void run(const Options& o) {
  const std::int64_t slots = o.batch + 2;
  Tensor x(o.dtype, o.batch * o.seqlen, o.dim, o.dim + 3), state(o.state_dtype, slots * o.state_len, o.dim);
  Tensor weight(o.weight_dtype, o.dim, o.width), bias(o.weight_dtype, 1, o.dim), y(o.dtype, o.batch * o.seqlen, o.dim);
  for (Tensor* tensor : {&x, &state, &weight, &bias}) tensor->random(1.0);
  const Numbers input = x.values(), w = weight.values(), b = bias.values();
  Numbers held = state.values(), expected(o.batch * o.seqlen * o.dim, 0.0);

  CausalConv1dStepParams p;
  p.dtype = o.dtype, p.state_dtype = o.state_dtype, p.weight_dtype = p.bias_dtype = o.weight_dtype;
  p.silu = o.silu, p.threads = o.threads;
  p.batch = o.batch, p.seqlen = o.seqlen, p.dim = o.dim, p.width = o.width, p.state_len = o.state_len;
  p.x = x.data(), p.state = state.data(), p.weight = weight.data(), p.bias = o.bias ? bias.data() : nullptr;
  p.seen = o.seen.empty() ? nullptr : o.seen.data(), p.slots = o.slots.empty() ? nullptr : o.slots.data();
  p.y = y.data(), p.x_batch_stride = o.seqlen * x.stride(), p.x_stride = x.stride();
  SSMKIT_CPU(causal_conv1d_step)(p);

  for (std::int64_t row = 0; row < o.batch; ++row) {
    const std::int64_t slot = o.slots.empty() ? row : o.slots[row];
    if (slot < 0) continue;
    for (std::int64_t c = 0; c < o.dim; ++c) {
      const auto entry = [&](std::int64_t i) -> double& {
        const std::int64_t place = o.seen.empty() ? i : (o.seen[row] + i) % o.state_len;
        return held[(slot * o.state_len + place) * o.dim + c];
      };
      Numbers line;
      for (std::int64_t i = 0; i < o.state_len; ++i) line.push_back(entry(i));
      for (std::int64_t t = 0; t < o.seqlen; ++t) {
        line.push_back(input[(row * o.seqlen + t) * o.dim + c]);
        double v = o.bias ? b[c] : 0.0;
        for (std::int64_t j = 0; j < o.width; ++j) v += w[c * o.width + j] * line[line.size() - o.width + j];
        expected[(row * o.seqlen + t) * o.dim + c] = o.silu ? v / (1 + std::exp(-v)) : v;
      }
      for (std::int64_t i = 0; i < o.state_len; ++i) {
        const std::int64_t place = o.seen.empty() ? i : (o.seen[row] + o.seqlen + i) % o.state_len;
        held[(slot * o.state_len + place) * o.dim + c] = line[line.size() - o.state_len + i];
      }
    }
  }
  testing::close("y", y.values(), expected, o.dtype);
  testing::close("state", state.values(), held, o.state_dtype);
}

const testing::Case kDTypes("every dtype of inputs, states and filters", [] {
  for (const DType half : {DType::bfloat16, DType::float16})
    for (const DType weight : {half, DType::float32}) {
      Options o;
      o.weight_dtype = weight;
      o.state_dtype = half, run(o);
      o.dtype = half, run(o);
      o.state_dtype = DType::float32, run(o);
    }
  Options o;
  o.dtype = o.state_dtype = DType::float64;
  o.weight_dtype = DType::float64, run(o);
  o.weight_dtype = DType::float32, run(o);
});

const testing::Case kShapes("lines and rings, slots, several tokens", [] {
  for (const std::int64_t seqlen : {0, 1, 2, 9})
    for (const std::int64_t width : {1, 2, 4, 7})
      for (const std::int64_t extra : {0, 1, 4}) {
        Options o;
        o.seqlen = seqlen, o.width = width, o.state_len = width - 1 + extra, o.threads = 2;
        run(o);
        o.silu = o.bias = false, o.slots = {4, -1, 0};
        run(o);
        if (o.state_len == 0) continue;
        o.seen = {0, 3, 1000};
        run(o);
      }
});

const testing::Case kThreads("channels enough for several threads", [] {
  Options o;
  o.dim = 20000, o.threads = 3;
  run(o);
});

}  // namespace
