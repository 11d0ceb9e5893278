// Launches Hopper's kernels over sorted rows for a coding known at run time.
#include "jobs.cuh"

namespace fd::cuda {

namespace tiles {
struct Low;
struct Short;
struct Tall;
}  // namespace tiles

template <Coding kCoding, typename Kind>
void launch_tiles_wgmma(const TilesJob& job, int multiprocessors, cudaStream_t stream);

namespace {

template <Coding kCoding>
void launch(const TilesJob& job, int tile_tokens, int multiprocessors, cudaStream_t stream) {
  if (tile_tokens <= kMostLowRows) {
    return launch_tiles_wgmma<kCoding, tiles::Low>(job, multiprocessors, stream);
  }
  if (tile_tokens > kMostShortRows) {
    launch_tiles_wgmma<kCoding, tiles::Tall>(job, multiprocessors, stream);
  }
  launch_tiles_wgmma<kCoding, tiles::Short>(job, multiprocessors, stream);
}

}  // namespace

bool has_hopper_code() {
#if defined(FD_SM90A)
  return true;
#else
  return false;
#endif
}

void tiles_hopper(const TilesJob& job, int tile_tokens, int multiprocessors, cudaStream_t stream) {
  switch (job.w.coding) {
    case Coding::kCcq:
      return launch<Coding::kCcq>(job, tile_tokens, multiprocessors, stream);
    case Coding::kInt4:
      return launch<Coding::kInt4>(job, tile_tokens, multiprocessors, stream);
    case Coding::kInt8:
      return launch<Coding::kInt8>(job, tile_tokens, multiprocessors, stream);
  }
}

}  // namespace fd::cuda
