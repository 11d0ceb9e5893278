// Guesses of the next tokens: by looking up what followed before.
#include <pybind11/stl.h>

#include <memory>

#include "../cpu/drafters.h"
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

  using cpu::AnswerIndex;
  using cpu::Drafter;
  py::class_<AnswerIndex, std::shared_ptr<AnswerIndex>>(m, "AnswerIndex",
                                                        "The newest tokens of earlier answers.")
      .def(py::init<int64_t>(), py::arg("most_tokens"))
      .def("add", &AnswerIndex::add, py::arg("answer"),
           "Remember an answer, of a long one its end.")
      .def("propose", &AnswerIndex::propose, py::arg("context"), py::arg("most"),
           py::arg("least_share"), "What followed the longest known end of `context`.")
      .def_property_readonly("num_tokens", &AnswerIndex::num_tokens);
  py::class_<Drafter, std::shared_ptr<Drafter>>(m, "Drafter", "The memory of one sequence.")
      .def("extend", &Drafter::extend, py::arg("tokens"), no_gil(),
           "Append tokens of the sequence.")
      .def("propose", &Drafter::propose, py::arg("most"), no_gil(),
           "Guess at most `most` tokens after those that are known; and how many tokens before "
           "them had occurred in the same order.");
  py::class_<cpu::NgramDrafter, Drafter, std::shared_ptr<cpu::NgramDrafter>>(
      m, "NgramDrafter", "Copies what followed the longest, latest match of the newest tokens.")
      .def(py::init<int32_t, int32_t>(), py::arg("shortest"), py::arg("longest"));
  py::class_<cpu::SuffixDrafter, Drafter, std::shared_ptr<cpu::SuffixDrafter>>(
      m, "SuffixDrafter", "Follows the longest end that occurred before, here or in an answer.")
      .def(py::init<std::shared_ptr<AnswerIndex>, float, int64_t>(), py::arg("answers"),
           py::arg("least_share"), py::arg("most_indexed"));
  m.def("propose_all", &cpu::propose_all, py::arg("drafters"), py::arg("tokens"), py::arg("most"),
        no_gil(), "Let each drafter read its new tokens and guess.");
  m.def("rank_guesses", &cpu::rank_guesses, py::arg("rates"), py::arg("lengths"), py::arg("leads"),
        py::arg("least"), py::arg("most"),
        "Order the tokens of guesses, one a sequence, by their use; the tokens that the first "
        "0, 1, ... of them are expected to give, and the sequence of each.");
}

}  // namespace fd
