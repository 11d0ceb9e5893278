// Packed weights, linear maps, embeddings and mixture of experts.
#include <pybind11/stl.h>

#include <optional>

#include "../cpu/linear.h"
#include "bindings.h"
#include "recording.h"

namespace fd {
namespace {

PackedWeight make_weight(const std::string& kind, int64_t in_features, int64_t out_features,
                         int64_t experts, uintptr_t data, uintptr_t scale, uintptr_t codes) {
  PackedWeight weight{weight_kind(kind),
                      in_features,
                      out_features,
                      experts,
                      reinterpret_cast<uint8_t*>(data),
                      reinterpret_cast<float*>(scale),
                      reinterpret_cast<CcqCodes*>(codes)};
  weight.check();
  return weight;
}

int digits_of(int activation_bits) {
  if (activation_bits != 16 && activation_bits != 24) {
    throw std::invalid_argument("activation_bits is " + std::to_string(activation_bits) +
                                ", expected 16 or 24");
  }
  return activation_bits / 8;
}

// One call of fused_moe whose arguments were looked at once: a layer beside a card makes the same
// one in every step.
class ExpertsCall {
 public:
  ExpertsCall(const TensorView& x, const TensorView& ids, const TensorView& weights,
              const PackedWeight& up_gate, const PackedWeight& down, const TensorView& out)
      : x_(x), ids_(ids), weights_(weights), up_gate_(up_gate), down_(down), out_(out) {}

  void operator()(uintptr_t workspace, int64_t bytes) const {
    TensorView memory;
    memory.data = reinterpret_cast<void*>(workspace);
    memory.dtype = DType::kUInt8;
    memory.rank = 1;
    memory.shape[0] = bytes;
    memory.strides[0] = 1;
    fused_moe(x_, ids_, weights_, up_gate_, down_, out_, memory);
  }

 private:
  TensorView x_, ids_, weights_;
  PackedWeight up_gate_, down_;
  TensorView out_;
};

void route_with(const TensorView& x, const TensorView& gate, const std::optional<TensorView>& bias,
                const TensorView& ids, const TensorView& weights) {
  route(x, gate, bias.value_or(TensorView{}), ids, weights);
}

void bind_weight(py::module_& m) {
  py::class_<PackedWeight>(m, "PackedWeight", "Addresses of a packed weight's parts; owns nothing.")
      .def(py::init(&make_weight), py::arg("kind"), py::arg("in_features"), py::arg("out_features"),
           py::arg("experts"), py::arg("data") = 0, py::arg("scale") = 0, py::arg("codes") = 0)
      .def_property_readonly(
          "data_bytes",
          [](const PackedWeight& w) { return w.experts * w.tiles() * w.tile_bytes(); })
      .def_property_readonly("codes_bytes",
                             [](const PackedWeight& w) {
                               const int64_t tiles =
                                   w.kind == WeightKind::kCcq ? w.experts * w.tiles() : 0;
                               return tiles * static_cast<int64_t>(sizeof(CcqCodes));
                             })
      .def_property_readonly("padded_columns",
                             [](const PackedWeight& w) { return w.tiles() * kTileColumns; })
      .def_property(
          "activation_bits", [](const PackedWeight& w) { return 8 * w.activation_digits; },
          [](PackedWeight& w, int bits) { w.activation_digits = digits_of(bits); });
  m.def("pack_dense", &pack_dense, py::arg("weight"), py::arg("expert"), py::arg("source"),
        py::arg("transposed"), no_gil());
  m.def("pack_int8", &pack_int8, py::arg("weight"), py::arg("expert"), py::arg("source"),
        py::arg("scale"), no_gil());
  m.def("pack_int4", &pack_int4, py::arg("weight"), py::arg("expert"), py::arg("source"),
        py::arg("scale"), no_gil());
  m.def("pack_ccq", &pack_ccq, py::arg("weight"), py::arg("expert"), py::arg("packed"),
        py::arg("local_scale"), py::arg("super_scale"), py::arg("code_scale"), py::arg("code_zp"),
        no_gil());
}

}  // namespace

void bind_linear(py::module_& m) {
  bind_weight(m);
  m.def("linear", recorded(&linear), py::arg("x"), py::arg("weight"), py::arg("out"), no_gil());
  m.def("embedding", recorded(&embedding), py::arg("token_ids"), py::arg("weight"), py::arg("out"),
        no_gil());
  m.def("embedding_share", &embedding_share, py::arg("token_ids"), py::arg("weight"),
        py::arg("first"), py::arg("out"), no_gil());
  m.def("route", recorded(&route_with), py::arg("x"), py::arg("gate_weight"), py::arg("bias"),
        py::arg("topk_ids"), py::arg("topk_weights"), no_gil());
  m.def("moe_workspace_bytes", &moe_workspace_bytes, py::arg("tokens"), py::arg("top_k"),
        py::arg("up_gate"), py::arg("down"));
  m.def("fused_moe", recorded(&fused_moe), py::arg("x"), py::arg("topk_ids"),
        py::arg("topk_weights"), py::arg("up_gate"), py::arg("down"), py::arg("out"),
        py::arg("workspace"), no_gil());
  py::class_<ExpertsCall>(m, "ExpertsCall", "fused_moe with all but its workspace; owns nothing.")
      .def(py::init<const TensorView&, const TensorView&, const TensorView&, const PackedWeight&,
                    const PackedWeight&, const TensorView&>(),
           py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"), py::arg("up_gate"),
           py::arg("down"), py::arg("out"))
      .def("__call__", &ExpertsCall::operator(), py::arg("workspace"), py::arg("bytes"), no_gil());
}

}  // namespace fd
