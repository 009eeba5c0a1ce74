#include "cpu/rates.h"

#include "bindings/registry.h"

static const ssmkit::Registration kRates([](py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("run_exp2", [](std::int64_t rounds, int threads) { return SSMKIT_CPU(run_exp2)({rounds, threads}); }, Release());
  m.def("run_fma", [](std::int64_t rounds, int threads) { return SSMKIT_CPU(run_fma)({rounds, threads}); }, Release());
});
