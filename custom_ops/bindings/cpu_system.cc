// Threads and instruction sets.
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu_features.h"
#include "parallel.h"

namespace fd {

void bind_system(py::module_& m) {
  m.def("num_threads", &num_threads, "Threads that an op may use, the caller included.");
  m.def("set_num_threads", &set_num_threads, py::arg("count"),
        "Change num_threads() for the process.");
  m.def(
      "current_isa", [] { return isa_name(current_isa()); }, "Name of the instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Switch the instruction set for the process.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (Isa isa : available_isas()) names.push_back(isa_name(isa));
        return names;
      },
      "Names of the instruction sets that were built and that this machine runs, plainest first.");
}

}  // namespace fd
