// The encoders of 2-bit weights on a card, over plain addresses:
// fastdeploy_lite/quantization/card.py has checked shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../cuda/encode/encode.h"
#include "../cuda/encode/terms.cuh"
#include "cuda_bindings.h"

namespace py = pybind11;

namespace {

namespace fc = fd::cuda;
using fc::Address;
using fc::at;
using fc::no_gil;
using fc::stream_of;

fc::EncodeInput encode_input(Address weight, bool is_float, Address row_of, int rows, int columns,
                             Address books, int codes, const std::vector<double>& factors) {
  if (factors.size() > fc::kMaxFactors) {
    throw std::invalid_argument("factors: found " + std::to_string(factors.size()) +
                                ", expected at most " + std::to_string(fc::kMaxFactors));
  }
  fc::EncodeInput input{at<const void>(weight),
                        is_float,
                        at<const int>(row_of),
                        rows,
                        columns,
                        at<const float4>(books),
                        codes,
                        static_cast<int>(factors.size()),
                        {}};
  std::copy(factors.begin(), factors.end(), input.factor);
  return input;
}

fc::EncodeResult encode_result(const std::array<Address, 6>& a) {
  return {at<uint8_t>(a[0]), at<uint8_t>(a[1]), at<float>(a[2]),
          at<int>(a[3]),     at<int>(a[4]),     at<double>(a[5])};
}

fc::HessianTerms hessian_terms(const std::array<Address, 6>& a) {
  return {at<const float>(a[0]), at<const float>(a[1]), at<const float>(a[2]),
          at<const float>(a[3]), at<const float>(a[4]), at<const float>(a[5])};
}

}  // namespace

void bind_encode(py::module_& m) {
  py::class_<fc::EncodeInput>(m, "EncodeInput")
      .def(py::init(&encode_input), py::arg("weight"), py::arg("is_float"), py::arg("row_of"),
           py::arg("rows"), py::arg("columns"), py::arg("books"), py::arg("codes"),
           py::arg("factors"));
  m.attr("bad_column") = fc::kBadColumn;
  m.def("encode_plain_bytes", &fc::encode_plain_bytes);
  m.def("encode_hessian_bytes", &fc::encode_hessian_bytes);
  m.def(
      "encode_plain",
      [](const fc::EncodeInput& input, int refinements, const std::array<Address, 6>& result,
         Address scratch, Address stream) {
        fc::encode_plain(input, refinements, encode_result(result), at<void>(scratch),
                         stream_of(stream));
      },
      no_gil());
  m.def(
      "encode_hessian",
      [](const fc::EncodeInput& input, const std::array<Address, 6>& terms, int candidates,
         int descents, const std::array<Address, 6>& result, Address scratch, Address stream) {
        fc::encode_hessian(input, hessian_terms(terms), candidates, descents, encode_result(result),
                           at<void>(scratch), stream_of(stream));
      },
      no_gil());
  m.def(
      "hessian_terms",
      [](const std::array<Address, 6>& terms, int size, Address wide, Address status,
         Address stream) {
        const fc::HessianTerms t = hessian_terms(terms);
        const auto out = [](const float* part) { return const_cast<float*>(part); };
        fc::factorize(t.hessian, size, at<double>(wide), at<int>(status), stream_of(stream));
        fc::elimination_terms(at<double>(wide), size, out(t.elimination_metric), out(t.feedback),
                              stream_of(stream));
        fc::descent_terms(t.hessian, size, out(t.descent_metric), out(t.descent_inverse),
                          out(t.descent_feedback), stream_of(stream));
      },
      no_gil());
  m.def("blend_moments",
        [](Address first, double first_share, Address second, double second_share, int size,
           double damping, Address mean, Address mixed, Address status, Address stream) {
          fc::blend_moments(at<const float>(first), first_share, at<const float>(second),
                            second_share, size, damping, at<double>(mean), at<float>(mixed),
                            at<int>(status), stream_of(stream));
        });
  m.def(
      "factorize",
      [](Address hessian, int size, Address wide, Address status, Address stream) {
        fc::factorize(at<const float>(hessian), size, at<double>(wide), at<int>(status),
                      stream_of(stream));
      },
      no_gil());
  m.def(
      "solve",
      [](Address upper, int size, Address right, double divisor, int columns, Address wide,
         Address solution, Address stream) {
        fc::solve(at<const double>(upper), size, at<const float>(right), divisor, columns,
                  at<double>(wide), at<float>(solution), stream_of(stream));
      },
      no_gil());
  m.def("swiglu",
        [](Address both, Address weight, int tokens, int width, Address out, Address stream) {
          fc::swiglu(at<const float>(both), at<const float>(weight), tokens, width, at<float>(out),
                     stream_of(stream));
        });
  m.def("permute_moments", [](Address from, Address row_of, int size, Address to, Address stream) {
    fc::permute_moments(at<const float>(from), at<const int>(row_of), size, at<float>(to),
                        stream_of(stream));
  });
  m.attr("inner_parts") = fc::kInnerParts;
  m.def("inner_product",
        [](Address a, Address b, int64_t count, Address parts, Address total, Address stream) {
          fc::inner_product(at<const float>(a), at<const float>(b), count, at<double>(parts),
                            at<double>(total), stream_of(stream));
        });
  m.def("multiply",
        [](Address a, int64_t lda, bool transposed, Address b, int64_t ldb, Address c, int64_t ldc,
           int rows, int columns, int depth, bool accumulate, Address stream) {
          fc::multiply({at<const float>(a), lda, transposed, at<const float>(b), ldb, at<float>(c),
                        ldc, rows, columns, depth, accumulate},
                       stream_of(stream));
        });
}
