// The module ssmkit.native._native: what every op registered (csrc/bindings/<op>.cpp) and the choice of capability.
#include <string>

#include "bindings/registry.h"

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

PYBIND11_MODULE(_native, m) {
  m.attr("openmp") = kOpenMP;
  m.def("cpu_capability", [] { return ssmkit::name_of(ssmkit::cpu_capability()); });
  m.def("cpu_capabilities", [] {
    py::list names;
    using ssmkit::Capability;
    for (auto capability : {Capability::avx512_bf16, Capability::avx512, Capability::avx2, Capability::baseline})
      if (ssmkit::usable(capability)) names.append(ssmkit::name_of(capability));
    return names;
  });
  m.def("set_cpu_capability", [](const std::string& name) {
    if (const char* refusal = ssmkit::set_cpu_capability(name.c_str())) throw py::value_error(refusal);
  });
  for (auto* registration = ssmkit::Registration::first(); registration; registration = registration->next)
    registration->bind(m);
}
