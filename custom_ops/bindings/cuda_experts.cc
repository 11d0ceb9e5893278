// The experts of a MoE layer on a card, over plain addresses:
// fastdeploy_lite/model_executor/ops/cuda_moe.py and cuda_experts.py have checked shapes and
// dtypes.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../cuda/gemm/experts.h"
#include "../cuda/gemm/pack_experts.h"
#include "cuda_bindings.h"

namespace py = pybind11;

namespace {

namespace fc = fd::cuda;
using fc::Address;
using fc::at;
using fc::stream_of;

fc::ExpertWeight expert_weight(int coding, Address chunks, Address codes, Address exact,
                               Address column_scale, int experts, int in_features, int out_features,
                               bool proven) {
  return {static_cast<fc::Coding>(coding),
          at<const uint8_t>(chunks),
          at<const fc::ColumnCode>(codes),
          at<const float2>(exact),
          at<const float>(column_scale),
          experts,
          in_features,
          out_features,
          proven};
}

fc::ExpertsShape shape_of(const fc::ExpertWeight& up, const fc::ExpertWeight& down, int tokens,
                          int top_k, bool same_bits) {
  fc::ExpertsShape shape = fc::experts_shape(up, down);
  shape.tokens = tokens;
  shape.top_k = top_k;
  shape.same_bits = same_bits;
  return shape;
}

/// Bytes of scratch of a call and of state of the card.
py::tuple experts_bytes(const fc::ExpertWeight& up, const fc::ExpertWeight& down, int tokens,
                        int top_k, int path, bool same_bits) {
  const fc::CardFacts& card = fc::card_facts();
  const fc::ExpertsShape shape = shape_of(up, down, tokens, top_k, same_bits);
  const fc::ExpertsPlan plan = fc::plan_experts(shape, card, path);
  return py::make_tuple(fc::experts_memory_bytes(plan, shape, card), fc::experts_state_bytes(card));
}

void experts(Address x, Address ids, Address weights, const fc::ExpertWeight& up,
             const fc::ExpertWeight& down, Address out, int tokens, int top_k, int path,
             bool same_bits, Address memory, Address state, Address stream) {
  const fc::CardFacts& card = fc::card_facts();
  const fc::ExpertsPlan plan =
      fc::plan_experts(shape_of(up, down, tokens, top_k, same_bits), card, path);
  const fc::ExpertsCall call{at<const __nv_bfloat16>(x),
                             at<const int>(ids),
                             at<const float>(weights),
                             up,
                             down,
                             at<__nv_bfloat16>(out),
                             tokens,
                             top_k};
  fc::run_experts(plan, call, {at<void>(memory), at<void>(state)}, card, stream_of(stream));
}

}  // namespace

void bind_experts(py::module_& m) {
  py::class_<fc::ExpertWeight>(m, "ExpertWeight")
      .def(py::init(&expert_weight), py::arg("coding"), py::arg("chunks"), py::arg("codes"),
           py::arg("exact"), py::arg("column_scale"), py::arg("experts"), py::arg("in_features"),
           py::arg("out_features"), py::arg("proven"));
  m.attr("chunk_rows") = fc::kChunkK;
  m.def("chunk_bytes", [](int coding) { return fc::chunk_bytes(static_cast<fc::Coding>(coding)); });
  m.def("pack_expert", [](int coding, Address codes, Address local_scale, Address chunks,
                          int in_features, int out_features, Address stream) {
    fc::pack_expert(static_cast<fc::Coding>(coding), at<const void>(codes),
                    at<const uint8_t>(local_scale), at<uint8_t>(chunks), in_features, out_features,
                    stream_of(stream));
  });
  m.def("fit_columns",
        [](Address exact, Address codes, int columns, Address unproven, Address stream) {
          fc::fit_columns(at<const float2>(exact), at<fc::ColumnCode>(codes), columns,
                          at<int>(unproven), stream_of(stream));
        });
  m.def("unpack_expert",
        [](const fc::ExpertWeight& w, int expert, bool scaled, Address out, Address stream) {
          fc::unpack_expert(w, expert, scaled, at<float>(out), stream_of(stream));
        });
  m.def("experts_bytes", &experts_bytes);
  m.def("experts", &experts);
}
