// The order of work of both encoders; see ccq_search.py and ccq_hessian.py, whose steps these are.
#include "encode.h"

#include <algorithm>

#include "../common.cuh"
#include "../pieces.h"
#include "columns.cuh"

namespace fd::cuda {
namespace {

constexpr int kRows = 64;  // of a group
constexpr int kBlocks = 16;
constexpr int kWords = 256;

/// What both encoders need.
struct Common {
  Common(Pieces& arena, int rows, int columns, int codes)
      : scaled(arena.take<float>(int64_t{columns} * rows)),
        error(arena.take<float>(int64_t{columns} * rows)),
        packed(arena.take<uint8_t>(int64_t{columns} * rows / 4)),
        rms(arena.take<double>(int64_t{columns} * rows / kRows)),
        energy(arena.take<double>(int64_t{columns} * rows / kRows)),
        scale(arena.take<float>(int64_t{columns} * rows / kRows * kMaxFactors)),
        losses(arena.take<float>(int64_t{columns} * rows / kRows * std::max(codes, kMaxFactors))),
        sums(arena.take<double>(int64_t{columns} * std::max(codes, kMaxFactors))) {}
  float *scaled, *error;
  uint8_t* packed;
  double *rms, *energy;
  float *scale, *losses;
  double* sums;
};

struct Plain : Common {
  Plain(Pieces& arena, int rows, int columns, int codes)
      : Common(arena, rows, columns, codes),
        metric(arena.take<float>(16)),
        half(arena.take<float>(int64_t{codes} * kWords)) {}
  float *metric, *half;
};

struct Moments : Common {
  Moments(Pieces& arena, int rows, int columns, int codes, int candidates)
      : Common(arena, rows, columns, codes),
        half(arena.take<float>(int64_t{codes} * rows / 4 * kWords)),
        descent_half(arena.take<float>(int64_t{codes} * rows / 4 * kWords)),
        weight_product(arena.take<float>(int64_t{columns} * rows)),
        product(arena.take<float>(int64_t{columns} * rows)),
        target(arena.take<float>(int64_t{columns} * rows)),
        change(arena.take<float>(int64_t{columns} * kRows)),
        best_error(arena.take<float>(int64_t{columns} * rows)),
        order(arena.take<int>(int64_t{columns} * candidates)),
        start_local(arena.take<uint8_t>(int64_t{columns} * rows / kRows)),
        local(arena.take<uint8_t>(int64_t{columns} * rows / kRows)),
        start_super(arena.take<float>(columns)),
        super_scale(arena.take<float>(columns)),
        code(arena.take<int>(columns)),
        best_packed(arena.take<uint8_t>(int64_t{columns} * rows / 4)),
        least(arena.take<double>(columns)) {}
  float *half, *descent_half, *weight_product, *product, *target, *change, *best_error;
  int* order;
  uint8_t *start_local, *local;
  float *start_super, *super_scale;
  int* code;
  uint8_t* best_packed;
  double* least;
};

void copy_device(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream),
        "encode: copy");
}

/// Steps 1 to 3 of ccq_search.py, which are step 1 of ccq_hessian.py: the scales to start with, and
/// sums of losses of every code in common.sums. half: 0 or the codes' and blocks' steps in it.
void start(const EncodeInput& input, const Common& common, const float* metric, int metric_block,
           const float* half, int64_t half_code, int64_t half_block, bool weighted,
           const EncodeResult& result, cudaStream_t stream) {
  const int columns = input.columns, groups = input.rows / kRows;
  const int64_t count = int64_t{columns} * groups;
  prepare_columns(input, common.scaled, result.exponent, stream);
  measure_groups(common.scaled, columns, groups, weighted ? metric : nullptr, common.rms,
                 common.energy, stream);
  trial_scales(input, common.rms, common.scale, stream);
  PlainLosses losses{columns,       groups,       input.factors, 0,         0,
                     common.scaled, input.books,  half,          half_code, half_block,
                     metric,        metric_block, common.scale,  count,     common.losses};
  plain_losses(losses, stream);
  sum_losses(common.losses, input.factors, columns, groups, common.sums, stream);
  fit_scales(input, common.sums, common.rms, common.energy, result.exponent, result.local,
             result.super_scale, stream);
  group_scales(result.local, result.super_scale, columns, groups, common.scale, stream);
  losses.count = input.codes;
  losses.code_step = 1;
  losses.scale_step = 0;
  plain_losses(losses, stream);
  sum_losses(common.losses, input.codes, columns, groups, common.sums, stream);
}

/// One elimination or descent: all groups in order.
struct Passes {
  const EncodeInput& input;
  const HessianTerms& terms;
  const Moments& room;
  HessianState state;
  cudaStream_t stream;

  GroupSearch search(int group) const {
    GroupSearch s{};
    s.columns = input.columns;
    s.first_group = group;
    s.groups = 1;
    s.all_groups = input.rows / kRows;
    s.weight = state.weight;
    s.books = input.books;
    s.half_block = kWords;
    s.half_code = int64_t{input.rows} / 4 * kWords;
    s.metric_block = 16;
    s.code = state.code;
    s.super_scale = state.super_scale;
    s.trials = 3;
    s.local = state.local;
    s.error = state.error;
    s.packed = state.packed;
    return s;
  }

  void eliminate() const {
    const int rows = input.rows, columns = input.columns;
    copy_device(room.target, state.weight, int64_t{columns} * rows * 4, stream);
    for (int group = 0; group < rows / kRows; ++group) {
      const int first = group * kRows, next = first + kRows;
      GroupSearch s = search(group);
      s.target = room.target;
      s.half = room.half;
      s.metric = terms.elimination_metric;
      s.feedback = terms.feedback + int64_t{first} * rows + first;
      s.feedback_stride = rows;
      search_groups(s, stream);
      if (next < rows) {
        multiply({state.error + first, rows, false, terms.feedback + int64_t{first} * rows + next,
                  rows, room.target + next, rows, columns, rows - next, kRows, true},
                 stream);
      }
    }
    multiply({state.error, rows, false, terms.hessian, rows, state.product, rows, columns, rows,
              rows, false},
             stream);
  }

  void descend() const {
    const int rows = input.rows, columns = input.columns;
    for (int group = 0; group < rows / kRows; ++group) {
      GroupSearch s = search(group);
      s.product = state.product;
      s.inverse = terms.descent_inverse;
      s.half = room.descent_half;
      s.metric = terms.descent_metric;
      s.feedback = terms.descent_feedback + int64_t{group} * kRows * kRows;
      s.feedback_stride = kRows;
      s.change = room.change;
      search_groups(s, stream);
      multiply({room.change, kRows, false, terms.hessian + int64_t{group} * kRows * rows, rows,
                state.product, rows, columns, rows, kRows, true},
               stream);
    }
  }

  void solve(const int* exponent) const { solve_super_scale(input, exponent, state, stream); }
};

}  // namespace

int64_t encode_plain_bytes(int rows, int columns, int codes) {
  Pieces arena(nullptr);
  const Plain counted(arena, rows, columns, codes);
  return arena.used();
}

void encode_plain(const EncodeInput& input, int refinements, const EncodeResult& result,
                  void* scratch, cudaStream_t stream) {
  Pieces arena(scratch);
  const Plain room(arena, input.rows, input.columns, input.codes);
  const int groups = input.rows / kRows;
  identity_metric(room.metric, stream);
  half_squares(input.books, input.codes, room.metric, 1, room.half, stream);
  start(input, room, room.metric, 0, room.half, kWords, 0, false, result, stream);
  rank_codes(room.sums, input.columns, input.codes, 1, result.code, stream);
  GroupSearch s{};
  s.columns = input.columns;
  s.groups = s.all_groups = groups;
  s.weight = s.target = room.scaled;
  s.books = input.books;
  s.half = room.half;
  s.half_code = kWords;
  s.metric = room.metric;
  s.code = result.code;
  s.super_scale = result.super_scale;
  s.local = result.local;
  s.error = room.error;
  s.packed = room.packed;
  for (int i = 0; i < refinements; ++i) {
    s.trials = 3;
    search_groups(s, stream);
    fit_super_scale(input, room.scaled, result.exponent, result.code, room.packed, result.local,
                    result.super_scale, stream);
  }
  s.trials = 1;
  search_groups(s, stream);
  finish_columns(room.packed, room.scaled, room.error, input.columns, input.rows, result, stream);
}

int64_t encode_hessian_bytes(int rows, int columns, int codes) {
  Pieces arena(nullptr);
  const Moments counted(arena, rows, columns, codes, codes);
  return arena.used();
}

void encode_hessian(const EncodeInput& input, const HessianTerms& terms, int candidates,
                    int descents, const EncodeResult& result, void* scratch, cudaStream_t stream) {
  Pieces arena(scratch);
  const int rows = input.rows, columns = input.columns, groups = rows / kRows;
  const Moments room(arena, rows, columns, input.codes, input.codes);
  half_squares(input.books, input.codes, terms.elimination_metric, rows / 4, room.half, stream);
  half_squares(input.books, input.codes, terms.descent_metric, rows / 4, room.descent_half, stream);
  start(input, room, terms.elimination_metric, 16, room.half, int64_t{rows} / 4 * kWords, kWords,
        true, result, stream);
  rank_codes(room.sums, columns, input.codes, candidates, room.order, stream);
  multiply({room.scaled, rows, false, terms.hessian, rows, room.weight_product, rows, columns, rows,
            rows, false},
           stream);
  const HessianState tried{room.scaled, room.weight_product, room.code,  room.super_scale,
                           room.local,  room.packed,         room.error, room.product};
  const HessianState best{room.scaled,  room.weight_product, result.code,     result.super_scale,
                          result.local, room.best_packed,    room.best_error, nullptr};
  const Passes passes{input, terms, room, tried, stream};
  const int64_t locals = int64_t{columns} * groups, supers = int64_t{columns} * 4;
  const auto begin = [&](const int* code, const uint8_t* local, const float* super_scale) {
    copy_device(room.code, code, int64_t{columns} * 4, stream);
    copy_device(room.local, local, locals, stream);
    copy_device(room.super_scale, super_scale, supers, stream);
  };
  begin(room.order, result.local, result.super_scale);
  passes.eliminate();
  passes.solve(result.exponent);
  copy_device(room.start_local, room.local, locals, stream);
  copy_device(room.start_super, room.super_scale, supers, stream);
  for (int candidate = 0; candidate < candidates; ++candidate) {
    begin(room.order + int64_t{candidate} * columns, room.start_local, room.start_super);
    passes.eliminate();
    passes.solve(result.exponent);
    for (int i = 0; i < descents; ++i) {
      passes.descend();
      passes.solve(result.exponent);
    }
    keep_better(tried, best, columns, groups, candidate == 0, room.least, stream);
  }
  finish_columns(room.best_packed, room.scaled, room.best_error, columns, rows, result, stream);
}

}  // namespace fd::cuda
