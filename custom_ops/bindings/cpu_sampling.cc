// From logits to tokens.
#include <pybind11/stl.h>

#include <optional>

#include "../cpu/philox.h"
#include "../cpu/sampling.h"
#include "../cpu/sampling_kernels.h"
#include "bindings.h"

namespace fd {
namespace {

cpu::Logits logits_rows(const TensorView& view) {
  view.check_rank("logits", 2);
  if (view.shape[1] < 1 || view.shape[1] >= kMaxVocabulary) {
    throw std::invalid_argument("logits has a vocabulary of " + std::to_string(view.shape[1]) +
                                ", expected 1 to " + std::to_string(kMaxVocabulary - 1));
  }
  return {view.as<float>("logits"), view.shape[0], view.shape[1], view.strides[0]};
}

template <typename T>
T* vector(const char* name, const TensorView& view, int64_t count) {
  view.check_rank(name, 1).check_extent(name, 0, count);
  return view.as<T>(name);
}

template <typename T>
T* matrix(const char* name, const TensorView& view, int64_t rows, int64_t columns) {
  view.check_rank(name, 2).check_extent(name, 0, rows).check_extent(name, 1, columns);
  view.check_contiguous(name);
  return view.as<T>(name);
}

void mask_logits(const TensorView& view, const TensorView& bitmask, const TensorView& mask_rows) {
  const cpu::Logits logits = logits_rows(view);
  const int64_t words = (logits.vocabulary + 31) / 32;
  const auto* bits = matrix<int32_t>("bitmask", bitmask, bitmask.shape[0], words);
  cpu::mask_logits({logits, bits, bitmask.shape[0], words,
                    vector<int32_t>("bitmask_rows", mask_rows, logits.rows)});
}

void process_logits(const TensorView& view, const TensorView& slots,
                    const std::optional<TensorView>& occurrences, const TensorView& repetition,
                    const TensorView& frequency, const TensorView& presence,
                    const TensorView& temperature, const TensorView& edit_offsets,
                    const TensorView& edit_ids, const TensorView& edit_values) {
  const cpu::Logits logits = logits_rows(view);
  const int64_t rows = logits.rows, edits = edit_ids.shape[0];
  const int64_t slot_count = occurrences ? occurrences->shape[0] : 0;
  const int32_t* seen =
      occurrences ? matrix<int32_t>("occurrences", *occurrences, slot_count, logits.vocabulary)
                  : nullptr;
  cpu::process_logits(
      {logits, vector<int32_t>("slots", slots, rows), seen, slot_count,
       vector<float>("repetition", repetition, rows), vector<float>("frequency", frequency, rows),
       vector<float>("presence", presence, rows), vector<float>("temperature", temperature, rows),
       vector<int32_t>("edit_offsets", edit_offsets, rows + 1),
       vector<int32_t>("edit_ids", edit_ids, edits),
       vector<float>("edit_values", edit_values, edits), edits});
}

void update_occurrences(const TensorView& occurrences, const TensorView& slots,
                        const TensorView& token_ids, bool prompt) {
  const int64_t rows = occurrences.check_rank("occurrences", 2).shape[0];
  const int64_t vocabulary = occurrences.shape[1], count = slots.shape[0];
  cpu::update_occurrences({matrix<int32_t>("occurrences", occurrences, rows, vocabulary), rows,
                           vocabulary, vector<int32_t>("slots", slots, count),
                           vector<int32_t>("token_ids", token_ids, count), count, prompt});
}

void sample(const TensorView& view, const TensorView& temperature, const TensorView& top_k,
            const TensorView& top_p, const TensorView& min_p, const TensorView& seeds,
            const TensorView& steps, const TensorView& forced, const TensorView& out) {
  const cpu::Logits logits = logits_rows(view);
  const int64_t rows = logits.rows;
  cpu::sample({logits, vector<float>("temperature", temperature, rows),
               vector<int32_t>("top_k", top_k, rows), vector<float>("top_p", top_p, rows),
               vector<float>("min_p", min_p, rows), vector<int64_t>("seeds", seeds, rows),
               vector<int64_t>("steps", steps, rows), vector<int32_t>("forced", forced, rows),
               vector<int32_t>("out", out, rows)});
}

void token_logprobs(const TensorView& view, const TensorView& tokens, int64_t top,
                    const TensorView& out_logprob, const TensorView& out_rank,
                    const TensorView& out_ids, const TensorView& out_logprobs) {
  const cpu::Logits logits = logits_rows(view);
  const int64_t rows = logits.rows;
  if (top < 0 || top > logits.vocabulary) {
    throw std::invalid_argument("token_logprobs: k is " + std::to_string(top) + ", expected 0 to " +
                                std::to_string(logits.vocabulary));
  }
  cpu::token_logprobs({logits, vector<int32_t>("tokens", tokens, rows), top,
                       vector<float>("out_logprob", out_logprob, rows),
                       vector<int32_t>("out_rank", out_rank, rows),
                       matrix<int32_t>("out_ids", out_ids, rows, top),
                       matrix<float>("out_logprobs", out_logprobs, rows, top)});
}

void best_logits(const TensorView& view, const TensorView& temperature, const TensorView& out_ids,
                 const TensorView& out_values) {
  const cpu::Logits logits = logits_rows(view);
  const int64_t rows = logits.rows, count = out_ids.check_rank("out_ids", 2).shape[1];
  if (count < 1 || count > logits.vocabulary) {
    throw std::invalid_argument("best_logits: out_ids is " + std::to_string(count) +
                                " wide, expected 1 to " + std::to_string(logits.vocabulary));
  }
  cpu::best_logits({logits, vector<float>("temperature", temperature, rows), count,
                    matrix<int32_t>("out_ids", out_ids, rows, count),
                    matrix<float>("out_values", out_values, rows, count)});
}

}  // namespace

void bind_sampling(py::module_& m) {
  m.def("mask_logits", &mask_logits, py::arg("logits"), py::arg("bitmask"), py::arg("bitmask_rows"),
        no_gil());
  m.def("process_logits", &process_logits, py::arg("logits"), py::arg("slots"),
        py::arg("occurrences"), py::arg("repetition"), py::arg("frequency"), py::arg("presence"),
        py::arg("temperature"), py::arg("edit_offsets"), py::arg("edit_ids"),
        py::arg("edit_values"), no_gil());
  m.def("update_occurrences", &update_occurrences, py::arg("occurrences"), py::arg("slots"),
        py::arg("token_ids"), py::arg("prompt"), no_gil());
  m.def("sample", &sample, py::arg("logits"), py::arg("temperature"), py::arg("top_k"),
        py::arg("top_p"), py::arg("min_p"), py::arg("seeds"), py::arg("steps"), py::arg("forced"),
        py::arg("out"), no_gil());
  m.def("token_logprobs", &token_logprobs, py::arg("logits"), py::arg("tokens"), py::arg("k"),
        py::arg("out_logprob"), py::arg("out_rank"), py::arg("out_ids"), py::arg("out_logprobs"),
        no_gil());
  m.def("best_logits", &best_logits, py::arg("logits"), py::arg("temperature"), py::arg("out_ids"),
        py::arg("out_values"), no_gil());
  m.def("philox4x32_10", &philox4x32_10, py::arg("counter"), py::arg("key"),
        "The generator behind `sample`, for its known-answer tests.");
}

}  // namespace fd
