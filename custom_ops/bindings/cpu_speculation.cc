// The index behind suffix speculation.
#include <pybind11/stl.h>

#include "../cpu/suffix_index.h"
#include "bindings.h"

namespace fd {

void bind_speculation(py::module_& m) {
  using cpu::SuffixDraft;
  using cpu::SuffixIndex;
  py::class_<SuffixDraft>(m, "SuffixDraft", "Tokens that followed a context before.")
      .def_readonly("tokens", &SuffixDraft::tokens)
      .def_readonly("shares", &SuffixDraft::shares)
      .def_readonly("matched", &SuffixDraft::matched);
  py::class_<SuffixIndex>(m, "SuffixIndex", "Every substring of some token sequences, counted.")
      .def(py::init<>())
      .def("start_sequence", &SuffixIndex::start_sequence,
           "Begin another sequence; matches do not run across the boundary.")
      .def("extend", &SuffixIndex::extend, py::arg("tokens"), no_gil(),
           "Append tokens to the sequence that was started last.")
      .def("propose_repeat", &SuffixIndex::propose_repeat, py::arg("most"), py::arg("least_share"),
           "What followed the longest end of the only sequence that had occurred before.")
      .def("propose", &SuffixIndex::propose, py::arg("context"), py::arg("most"),
           py::arg("least_share"),
           "What followed the longest end of `context` that occurs in the index.")
      .def_property_readonly("num_tokens", &SuffixIndex::num_tokens)
      .def_property_readonly("nbytes", &SuffixIndex::nbytes);
}

}  // namespace fd
