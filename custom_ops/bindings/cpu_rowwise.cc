// Norms, activation, sums, gathers and conversions over rows.
#include "../cpu/bf16_rows.h"
#include "../cpu/rowwise.h"
#include "../cpu/rowwise_kernels.h"
#include "bindings.h"
#include "recording.h"

namespace fd {
namespace {

template <typename T>
cpu::Rows<T> rows(const char* name, const TensorView& view, int64_t count, int64_t width) {
  view.check_rank(name, 2).check_extent(name, 0, count).check_extent(name, 1, width);
  return {view.as<std::remove_const_t<T>>(name), count, width, view.strides[0]};
}

cpu::NormWeight norm_weight(const TensorView& view, int64_t width) {
  view.check_rank("weight", 1).check_extent("weight", 0, width);
  if (view.dtype == DType::kBFloat16) return {nullptr, view.as<uint16_t>("weight")};
  return {view.as<float>("weight"), nullptr};
}

void rms_norm(const TensorView& x, const TensorView& weight, float epsilon, const TensorView& out) {
  const int64_t count = x.shape[0], width = x.shape[1];
  cpu::rms_norm(rows<const float>("x", x, count, width), norm_weight(weight, width), epsilon,
                rows<float>("out", out, count, width));
}

void add_rms_norm(const TensorView& x, const TensorView& residual, const TensorView& weight,
                  float epsilon, const TensorView& out) {
  const int64_t count = x.shape[0], width = x.shape[1];
  cpu::add_rms_norm(rows<const float>("x", x, count, width),
                    rows<float>("residual", residual, count, width), norm_weight(weight, width),
                    epsilon, rows<float>("out", out, count, width));
}

void silu_and_mul(const TensorView& x, const TensorView& out) {
  const int64_t count = out.shape[0], width = out.shape[1];
  cpu::silu_and_mul(rows<const float>("x", x, count, 2 * width),
                    rows<float>("out", out, count, width));
}

void add_inplace(const TensorView& x, const TensorView& y) {
  const int64_t count = x.shape[0], width = x.shape[1];
  cpu::add_inplace(rows<float>("x", x, count, width), rows<const float>("y", y, count, width));
}

void gather_rows(const TensorView& x, const TensorView& indices, const TensorView& out) {
  const int64_t count = out.shape[0], width = out.shape[1];
  indices.check_rank("rows", 1).check_extent("rows", 0, count);
  cpu::gather_rows(rows<const float>("x", x, x.shape[0], width), indices.as<int32_t>("rows"),
                   rows<float>("out", out, count, width));
}

void widen(const TensorView& x, const TensorView& out) {
  const int64_t count = x.shape[0], width = x.shape[1];
  cpu::widen(rows<const uint16_t>("x", x, count, width), rows<float>("out", out, count, width));
}

void narrow(const TensorView& x, const TensorView& out) {
  const int64_t count = x.shape[0], width = x.shape[1];
  cpu::narrow(rows<const float>("x", x, count, width), rows<uint16_t>("out", out, count, width));
}

void exponential(const TensorView& x, const TensorView& out) {
  x.check_rank("x", 1);
  out.check_rank("out", 1).check_extent("out", 0, x.shape[0]);
  pick(rowwise_kernels_tables).exponential(x.as<float>("x"), x.shape[0], out.as<float>("out"));
}

}  // namespace

void bind_rowwise(py::module_& m) {
  m.def("rms_norm", recorded(&rms_norm), py::arg("x"), py::arg("weight"), py::arg("eps"),
        py::arg("out"), no_gil());
  m.def("add_rms_norm", recorded(&add_rms_norm), py::arg("x"), py::arg("residual"),
        py::arg("weight"), py::arg("eps"), py::arg("out"), no_gil());
  m.def("silu_and_mul", recorded(&silu_and_mul), py::arg("x"), py::arg("out"), no_gil());
  m.def("add_inplace", recorded(&add_inplace), py::arg("x"), py::arg("y"), no_gil());
  m.def("gather_rows", recorded(&gather_rows), py::arg("x"), py::arg("rows"), py::arg("out"),
        no_gil());
  m.def("widen", &widen, py::arg("x"), py::arg("out"), no_gil());
  m.def("narrow", &narrow, py::arg("x"), py::arg("out"), no_gil());
  m.def("exponential", &exponential, py::arg("x"), py::arg("out"), no_gil(),
        "e^x as the softmax and SwiGLU kernels compute it; for tests of its accuracy.");
}

}  // namespace fd
