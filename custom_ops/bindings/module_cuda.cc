// fastdeploy_lite._ops_cuda. What stands here takes plain addresses: shapes and dtypes were checked
// by the caller, fastdeploy_lite/model_executor/ops. The stream is the last argument everywhere.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../cuda/gemm_hopper.h"
#include "../cuda/nccl.h"
#include "../cuda/ops.h"
#include "../cuda/runtime.h"
#include "cuda_bindings.h"
#include "cuda_weight.h"

namespace py = pybind11;

void bind_attention(py::module_& m);   // cuda_attention.cc
void bind_encode(py::module_& m);      // cuda_encode.cc
void bind_experts(py::module_& m);     // cuda_experts.cc
void bind_tensor_ops(py::module_& m);  // cuda_tensor_ops.cc

namespace {

namespace fc = fd::cuda;
using fc::Address;
using fc::at;
using fc::no_gil;
using fc::stream_of;

fc::TiledWeight tiled_weight(Address tiles, Address local_scale, Address code_scale,
                             Address code_bias, Address column_scale, int in_features,
                             int out_features) {
  return {at<const uint4>(tiles),
          at<const uint16_t>(local_scale),
          at<const float>(code_scale),
          at<const float>(code_bias),
          at<const float>(column_scale),
          in_features,
          out_features,
          fc::ceil_div(out_features, fc::kTileColumns),
          fc::ceil_div(in_features, fc::kTileRows)};
}

fc::Weight make_weight(int kind, Address tiles, Address local_scale, Address code_scale,
                       Address code_bias, Address column_scale, int in_features, int out_features) {
  return {static_cast<fc::Kind>(kind), tiled_weight(tiles, local_scale, code_scale, code_bias,
                                                    column_scale, in_features, out_features)};
}

void bind_runtime(py::module_& m) {
  py::class_<fc::DeviceFacts>(m, "DeviceFacts")
      .def_readonly("name", &fc::DeviceFacts::name)
      .def_readonly("major", &fc::DeviceFacts::major)
      .def_readonly("minor", &fc::DeviceFacts::minor)
      .def_readonly("multiprocessors", &fc::DeviceFacts::multiprocessors)
      .def_readonly("total_bytes", &fc::DeviceFacts::total_bytes)
      .def_readonly("free_bytes", &fc::DeviceFacts::free_bytes);
  m.def("device_facts", &fc::device_facts, no_gil());
  m.def(
      "upload",
      [](Address device, Address host, int64_t bytes, Address stream) {
        fc::upload(at<void>(device), at<const void>(host), bytes, stream_of(stream));
      },
      no_gil());
  m.def(
      "download",
      [](Address host, Address device, int64_t bytes, Address stream) {
        fc::download(at<void>(host), at<const void>(device), bytes, stream_of(stream));
      },
      no_gil());
  m.def("copy", [](Address to, Address from, int64_t bytes, Address stream) {
    fc::copy(at<void>(to), at<const void>(from), bytes, stream_of(stream));
  });
  m.def("allocate", [](int64_t bytes) { return reinterpret_cast<Address>(fc::allocate(bytes)); });
  m.def("release", [](Address memory) { fc::release(at<void>(memory)); });
  m.def("allocate_pinned",
        [](int64_t bytes) { return reinterpret_cast<Address>(fc::allocate_pinned(bytes)); });
  m.def("free_pinned", [](Address memory) { fc::free_pinned(at<void>(memory)); });
  m.def("copy_to_pinned", [](Address pinned, Address device, int64_t bytes, Address stream) {
    fc::copy_to_pinned(at<void>(pinned), at<const void>(device), bytes, stream_of(stream));
  });
  m.def("copy_from_pinned", [](Address device, Address pinned, int64_t bytes, Address stream) {
    fc::copy_from_pinned(at<void>(device), at<const void>(pinned), bytes, stream_of(stream));
  });
  m.def("create_event", &fc::create_event);
  m.def("record_event",
        [](uint64_t event, Address stream) { fc::record_event(event, stream_of(stream)); });
  m.def("wait_event", &fc::wait_event, no_gil());
  m.def("clear", [](Address to, int64_t bytes, Address stream) {
    fc::clear(at<void>(to), bytes, stream_of(stream));
  });
  m.def(
      "time_copy",
      [](Address to, Address from, int64_t bytes, int repeats, Address stream) {
        return fc::time_copy(at<void>(to), at<const void>(from), bytes, repeats, stream_of(stream));
      },
      no_gil());
  m.def("synchronize", [](Address stream) { fc::synchronize(stream_of(stream)); }, no_gil());
  m.def("allow_early_start", &fc::allow_early_start);
  m.def("create_stream", &fc::create_stream);
  m.def("follow",
        [](Address stream, Address ahead) { fc::follow(stream_of(stream), stream_of(ahead)); });
  m.def("begin_capture", [](Address stream) { fc::begin_capture(stream_of(stream)); });
  m.def("end_capture",
        [](Address stream, bool discard) { return fc::end_capture(stream_of(stream), discard); });
  m.def(
      "launch_graph",
      [](uint64_t graph, Address stream) { fc::launch_graph(graph, stream_of(stream)); }, no_gil());
  m.def("destroy_graph", &fc::destroy_graph);
  m.def("blas_open", &fc::blas_open);
}

void bind_weights(py::module_& m) {
  py::class_<fc::Weight>(m, "Weight")
      .def(py::init(&make_weight), py::arg("kind"), py::arg("tiles"), py::arg("local_scale"),
           py::arg("code_scale"), py::arg("code_bias"), py::arg("column_scale"),
           py::arg("in_features"), py::arg("out_features"))
      .def("hopper_serves", [](const fc::Weight& weight, int64_t scratch_bytes) {
        return fc::hopper_serves(weight.kind, weight.tiled, scratch_bytes / 4);
      });
  m.attr("hopper_tile") = fc::kHopperTile;
  m.def("tile_bytes", [](int kind) { return fc::tile_bytes(static_cast<fc::Kind>(kind)); });
  m.def("pack_tiles", [](int kind, Address source, bool source_is_float, bool transposed,
                         Address tiles, int in_features, int out_features, Address stream) {
    fc::pack_tiles(kind, at<const void>(source), source_is_float, transposed, at<void>(tiles),
                   in_features, out_features, stream_of(stream));
  });
  m.def("pack_local_scales",
        [](Address source, Address packed, int in_features, int out_features, Address stream) {
          fc::pack_local_scales(at<const uint8_t>(source), at<void>(packed), in_features,
                                out_features, stream_of(stream));
        });
  m.def("pack_rows", [](Address source, bool source_is_float, bool transposed, Address out,
                        int in_features, int out_features, Address stream) {
    fc::pack_rows(at<const void>(source), source_is_float, transposed, at<fc::bf16>(out),
                  in_features, out_features, stream_of(stream));
  });
  m.def("unpack_tiles",
        [](const fc::Weight& w, int expert, bool scaled, Address out, Address stream) {
          const fc::TiledWeight& t = w.tiled;
          const int64_t blocks = int64_t{expert} * t.n_tiles;
          const int64_t tile = blocks * t.k_tiles, column = blocks * fc::kTileColumns;
          const int64_t vectors = fc::tile_bytes(w.kind) / 16;
          auto offset = [](const float* p, int64_t by) { return p == nullptr ? p : p + by; };
          fc::unpack_tiles(static_cast<int>(w.kind), t.tiles + tile * vectors,
                           t.local_scale == nullptr ? nullptr : t.local_scale + tile * 8,
                           offset(t.code_scale, column), offset(t.code_bias, column),
                           offset(t.column_scale, column), scaled, at<float>(out), t.in_features,
                           t.out_features, stream_of(stream));
        });
  m.def("randomize",
        [](int kind, Address data, int64_t bytes, uint64_t seed, float size, Address stream) {
          fc::randomize(kind, at<void>(data), bytes, seed, size, stream_of(stream));
        });
}

/// Without the GIL: each of these may wait for another rank.
void bind_ranks(py::module_& m) {
  m.def("nccl_open", &fc::nccl_open, no_gil());
  m.def("nccl_version", &fc::nccl_version);
  m.def("nccl_unique_id", [] { return py::bytes(fc::nccl_unique_id()); });
  py::class_<fc::NcclGroup>(m, "NcclGroup")
      .def(py::init<const std::string&, int, int, int>(), py::arg("id"), py::arg("rank"),
           py::arg("ranks"), py::arg("device"), no_gil())
      .def("share_memory", &fc::NcclGroup::share_memory, no_gil())
      .def("set_order", &fc::NcclGroup::set_order, py::arg("in_order"))
      .def("set_sharing", &fc::NcclGroup::set_sharing, py::arg("sharing"))
      .def(
          "all_reduce",
          [](fc::NcclGroup& group, Address x, bool is_float, int64_t count, Address scratch,
             int64_t scratch_bytes, Address stream) {
            group.all_reduce(at<void>(x), is_float, count, at<void>(scratch), scratch_bytes,
                             stream_of(stream));
          },
          no_gil())
      .def(
          "all_gather",
          [](fc::NcclGroup& group, Address x, int64_t rows, int64_t width, Address out,
             Address scratch, int64_t scratch_bytes, Address stream) {
            group.all_gather(at<const float>(x), rows, width, at<float>(out), at<void>(scratch),
                             scratch_bytes, stream_of(stream));
          },
          no_gil())
      .def("abort", &fc::NcclGroup::abort)
      .def_property_readonly("aborted", &fc::NcclGroup::aborted)
      .def_property_readonly("ended", &fc::NcclGroup::ended)
      .def(
          "wait_idle",
          [](const fc::NcclGroup& group, double seconds, Address stream) {
            return group.wait_idle(seconds, stream_of(stream));
          },
          no_gil());
  m.def("sum_of_ranks",
        [](Address parts, bool is_float, int ranks, int64_t count, Address out, Address stream) {
          fc::sum_of_ranks(at<const void>(parts), is_float, ranks, count, at<void>(out),
                           stream_of(stream));
        });
  m.def("side_by_side", [](Address parts, int ranks, int64_t rows, int64_t width, Address out,
                           Address stream) {
    fc::side_by_side(at<const float>(parts), ranks, rows, width, at<float>(out), stream_of(stream));
  });
}

}  // namespace

PYBIND11_MODULE(_ops_cuda, m) {
  m.doc() = "CUDA ops over views and device addresses; see fastdeploy_lite.model_executor.ops.";
  bind_runtime(m);
  bind_weights(m);
  bind_experts(m);
  bind_tensor_ops(m);
  bind_attention(m);
  bind_ranks(m);
  bind_encode(m);
}
