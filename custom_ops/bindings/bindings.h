// Glue shared by the files that bind CPU ops, whose tensors are views: see view_caster.h.
//
// A family of ops adds a file bindings/cpu_<family>.cc with `void bind_<family>(py::module_& m)`,
// declares it in module_cpu.cc and binds every op with `no_gil`, so that other Python threads run
// meanwhile. std::invalid_argument thrown by an op arrives as ValueError.
#pragma once

#include <pybind11/pybind11.h>

#include "view_caster.h"

namespace fd {
namespace py = pybind11;
using no_gil = py::call_guard<py::gil_scoped_release>;
}  // namespace fd
