// linear_step against sums written out.
#include "cpu/linear_step.h"

#include "harness.h"

namespace {

using namespace ssmkit;
using testing::Tensor;
using Numbers = std::vector<double>;

void run(DType dtype, std::int64_t batch, std::int64_t in, std::int64_t out, bool bias, int threads) {
  Tensor x(dtype, batch, in, in + 3), weight(dtype, out, in, in + 5), b(dtype, 1, out), y(dtype, batch, out);
  for (Tensor* tensor : {&x, &weight, &b}) tensor->random(1.0);
  const Numbers left = x.values(), right = weight.values(), add = b.values();
  Numbers expected, size;
  for (std::int64_t row = 0; row < batch; ++row)
    for (std::int64_t o = 0; o < out; ++o) {
      double total = bias ? add[o] : 0.0, terms = std::fabs(total);
      for (std::int64_t k = 0; k < in; ++k) {
        const double term = left[row * in + k] * right[o * in + k];
        total += term, terms += std::fabs(term);
      }
      expected.push_back(total), size.push_back(terms);
    }

  LinearStepParams p;
  p.dtype = dtype, p.threads = threads;
  p.batch = batch, p.in_features = in, p.out_features = out;
  p.x = x.data(), p.weight = weight.data(), p.bias = bias ? b.data() : nullptr, p.y = y.data();
  p.x_stride = x.stride(), p.weight_stride = weight.stride();
  SSMKIT_CPU(linear_step)(p);
  testing::close("y", y.values(), expected, size, dtype);
}

const testing::Case kShapes("every dtype, any number of rows and features", [] {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16, DType::float64})
    for (const std::int64_t batch : {1, 2, 3, 5, 9})
      for (const std::int64_t in : {1, 17, 64, 150})
        for (const std::int64_t out : {1, 6, 33}) run(dtype, batch, in, out, in % 2, 2);
});

const testing::Case kEmpty("empty", [] {
  run(DType::float32, 0, 4, 5, true, 2);
  run(DType::bfloat16, 3, 0, 5, true, 2);
  run(DType::float32, 3, 0, 5, false, 2);
  run(DType::float32, 3, 4, 0, true, 2);
});

const testing::Case kThreads("a weight for several threads", [] {
  run(DType::float32, 2, 512, 700, true, 3);
  run(DType::bfloat16, 9, 512, 700, true, 3);
});

}  // namespace
