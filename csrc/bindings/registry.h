// One file per op registers its own bindings, so that adding an op touches no shared line:
//
//   static const ssmkit::Registration kRates([](py::module_& m) { m.def("exp2_rate", ...); });
//
// Pointers come as uintptr_t (0 for None), sizes and strides as int64_t; the GIL is released around the kernel.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace ssmkit {

using Bind = void (*)(py::module_&);

struct Registration {
  explicit Registration(Bind bind) : bind(bind), next(first()) { first() = this; }

  static const Registration*& first() {
    static const Registration* head = nullptr;
    return head;
  }

  Bind bind;
  const Registration* next;
};

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace ssmkit
