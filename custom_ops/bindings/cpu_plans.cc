// Plans of the card's kernels for quantised experts: host code that any machine can check.
#include "../cuda/gemm/plan.h"
#include "../cuda/gemm/stream_shape.h"
#include "bindings.h"

namespace fd {

void bind_plans(py::module_& m) {
  m.def(
      "plan_experts",
      [](int tokens, int top_k, int experts, int hidden, int inner, int chunk_bytes, int major,
         int multiprocessors, int shared_bytes, int forced, bool ccq, bool same_bits) {
        const cuda::ExpertsPlan plan =
            cuda::plan_experts({tokens, top_k, experts, hidden, inner, chunk_bytes, ccq, same_bits},
                               {major, multiprocessors, shared_bytes}, forced);
        py::dict found;
        found["path"] = static_cast<int>(plan.path);
        found["tile_tokens"] = plan.tile_tokens;
        found["max_tiles"] = plan.max_tiles;
        found["room_bytes"] = plan.room_bytes;
        found["row_bytes"] = plan.row_bytes;
        return found;
      },
      py::kw_only(), py::arg("tokens"), py::arg("top_k"), py::arg("experts"), py::arg("hidden"),
      py::arg("inner"), py::arg("chunk_bytes"), py::arg("major"), py::arg("multiprocessors"),
      py::arg("shared_bytes"), py::arg("forced") = -1, py::arg("ccq") = false,
      py::arg("same_bits") = true,
      "Which kernels serve a call of quantised experts; see custom_ops/cuda/gemm/plan.h.");
  m.def(
      "stream_room",
      [](int bytes, int chunk_bytes, int wanted) {
        const cuda::StreamRoom room = cuda::stream_room(bytes, chunk_bytes, wanted);
        return py::make_tuple(room.row_bytes, room.stages, room.copy_chunks);
      },
      py::kw_only(), py::arg("bytes"), py::arg("chunk_bytes"), py::arg("wanted"),
      "Bytes of rows, slots of a ring and chunks of a copy of one block of the persistent kernel; "
      "see custom_ops/cuda/gemm/stream_shape.h.");
}

}  // namespace fd
