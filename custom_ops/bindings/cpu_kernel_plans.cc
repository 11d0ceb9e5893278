// Plans of the card's other kernels, as cpu_plans.cc: host code that any machine can check.
#include "../cuda/gemm/plan_attention.h"
#include "../cuda/gemm/plan_cards.h"
#include "../cuda/gemm/plan_linear.h"
#include "../cuda/gemm/plan_moe.h"
#include "bindings.h"

namespace fd {
namespace {

cuda::CardFacts card(int major, int multiprocessors) { return {major, multiprocessors, 0}; }

py::dict card_table(int major) {
  const cuda::CardTable& table = cuda::card_table(major);
  py::dict found;
  found["major"] = table.major;
  found["measured"] = table.measured;
  found["small_weight"] = table.small_weight;
  found["large_weight"] = table.large_weight;
  found["mma_rows"] = table.mma_rows;
  found["large_mma_rows"] = table.large_mma_rows;
  found["direct_tokens"] = table.direct_tokens;
  found["stream_tokens"] = table.stream_tokens;
  found["tile_means"] =
      py::make_tuple(table.tile_means[0], table.tile_means[1], table.tile_means[2]);
  return found;
}

void bind_linear_plans(py::module_& m) {
  m.attr("hopper_tile") = cuda::kHopperTile;
  m.def(
      "linear_tile",
      [](int rows, int kind, int in_features, int out_features, int64_t scratch_floats, int major,
         int multiprocessors, int forced) {
        return cuda::linear_tile(
            {rows, static_cast<cuda::Kind>(kind), in_features, out_features, scratch_floats},
            card(major, multiprocessors), forced);
      },
      py::kw_only(), py::arg("rows"), py::arg("kind"), py::arg("in_features"),
      py::arg("out_features"), py::arg("scratch_floats"), py::arg("major"),
      py::arg("multiprocessors"), py::arg("forced") = 0,
      "Rows of a tile of a linear map, which tell its kernel; see "
      "custom_ops/cuda/gemm/plan_linear.h.");
  m.def(
      "canonical_parts",
      [](int n_tiles, int k_tiles, bool gated, int tiles_of_token, int multiprocessors) {
        return cuda::canonical_parts({n_tiles, k_tiles, gated, tiles_of_token}, multiprocessors);
      },
      py::kw_only(), py::arg("n_tiles"), py::arg("k_tiles"), py::arg("gated"),
      py::arg("tiles_of_token"), py::arg("multiprocessors"),
      "Parts of K of a product with a tiled weight; see custom_ops/cuda/gemm/plan_linear.h.");
  m.def("part_begin", &cuda::part_begin, py::kw_only(), py::arg("k_tiles"), py::arg("part"),
        py::arg("parts"), "First k tile of a part of K; see custom_ops/cuda/gemm/linear_shape.h.");
  m.def(
      "splits_parts",
      [](int rows, int columns, int k_tiles, int parts, int blocks, int64_t partial_floats,
         int multiprocessors) {
        return cuda::splits_parts({rows, columns, k_tiles, parts}, blocks, partial_floats,
                                  multiprocessors);
      },
      py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("k_tiles"), py::arg("parts"),
      py::arg("blocks"), py::arg("partial_floats"), py::arg("multiprocessors"),
      "Whether parts of K go to blocks of their own; see custom_ops/cuda/gemm/plan_linear.h.");
  m.def("hopper_rows", &cuda::hopper_rows, py::kw_only(), py::arg("rows"), py::arg("k_tiles"),
        py::arg("scratch_floats"),
        "Rows of x that scratch holds at once for Hopper's linear kernel; see "
        "custom_ops/cuda/gemm/plan_linear.h.");
  m.def(
      "hopper_cut",
      [](int rows, int columns, int k_tiles, int parts, int64_t partial_floats,
         int multiprocessors) {
        const cuda::HopperCut cut =
            cuda::hopper_cut({rows, columns, k_tiles, parts}, partial_floats, multiprocessors);
        return py::make_tuple(cut.height, cut.tiles, cut.runs);
      },
      py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("k_tiles"), py::arg("parts"),
      py::arg("partial_floats"), py::arg("multiprocessors"),
      "Height and number of tiles of rows and runs of parts of K of Hopper's linear kernel; see "
      "custom_ops/cuda/gemm/plan_linear.h.");
}

void bind_moe_plans(py::module_& m) {
  m.def(
      "route_plan",
      [](int tokens, int hidden, int experts, int multiprocessors) {
        const cuda::RoutePlan plan = cuda::route_plan(tokens, hidden, experts, multiprocessors);
        return py::make_tuple(plan.run, plan.count);
      },
      py::kw_only(), py::arg("tokens"), py::arg("hidden"), py::arg("experts"),
      py::arg("multiprocessors"),
      "Pieces of K that a block of the router sums, and sums; see "
      "custom_ops/cuda/gemm/plan_moe.h.");
  m.def(
      "plan_dense_experts",
      [](int tokens, int top_k, int experts, int major, int forced) {
        const cuda::DenseExpertsPlan plan =
            cuda::plan_dense_experts({tokens, top_k, experts}, major, forced);
        return py::make_tuple(plan.tile_rows, plan.max_tiles);
      },
      py::kw_only(), py::arg("tokens"), py::arg("top_k"), py::arg("experts"), py::arg("major"),
      py::arg("forced") = -1,
      "Rows of a tile of bf16 experts and most tiles; see custom_ops/cuda/gemm/plan_moe.h.");
}

void bind_attention_plans(py::module_& m) {
  m.def(
      "plan_attention",
      [](int tokens, int sequences, int query_heads, int kv_heads, int head_dim, int table_width,
         int64_t capacity, int major, int multiprocessors) {
        const cuda::AttentionShape shape{tokens,   sequences,   query_heads, kv_heads,
                                         head_dim, table_width, table_width};
        const cuda::AttentionPlan plan = cuda::plan_attention(shape, multiprocessors, capacity);
        const int segments = cuda::most_segments(table_width);
        py::dict found;
        found["sequences"] = plan.sequences;
        found["blocks"] = plan.blocks;
        found["partial_floats"] = plan.partial_floats;
        found["segments"] = segments;
        found["decodes"] = cuda::decodes(shape);
        found["takes_chunks"] = cuda::takes_chunks(shape);
        found["chunks_on_wgmma"] = cuda::chunks_on_wgmma(shape, card(major, multiprocessors));
        found["decodes_in_one"] = cuda::decodes_in_one(shape, plan);
        found["merges_apart"] = cuda::merges_apart(plan.sequences, kv_heads, segments, plan.blocks);
        return found;
      },
      py::kw_only(), py::arg("tokens"), py::arg("sequences"), py::arg("query_heads"),
      py::arg("kv_heads"), py::arg("head_dim"), py::arg("table_width"), py::arg("capacity"),
      py::arg("major"), py::arg("multiprocessors"),
      "Kernels of attention that take a step, and how its decodes are spread; see "
      "custom_ops/cuda/gemm/plan_attention.h.");
}

}  // namespace

void bind_kernel_plans(py::module_& m) {
  m.def("card_table", &card_table, py::arg("major"),
        "Thresholds of an architecture, and whether they were measured on it; see "
        "custom_ops/cuda/gemm/plan_cards.h.");
  bind_linear_plans(m);
  bind_moe_plans(m);
  bind_attention_plans(m);
}

}  // namespace fd
