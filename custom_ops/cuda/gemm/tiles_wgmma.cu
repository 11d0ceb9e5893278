// Launches the wgmma kernels for a coding known at run time.
#include "jobs.cuh"

namespace fd::cuda {

template <Coding kCoding, bool kExact, bool kTall>
void launch_tiles_wgmma(const TilesJob& job, int multiprocessors, cudaStream_t stream);

namespace {

template <Coding kCoding, bool kExact>
void launch(const TilesJob& job, int tile_tokens, int multiprocessors, cudaStream_t stream) {
  if (tile_tokens > kShortTile) {
    launch_tiles_wgmma<kCoding, kExact, true>(job, multiprocessors, stream);
  }
  launch_tiles_wgmma<kCoding, kExact, false>(job, multiprocessors, stream);
}

}  // namespace

bool has_hopper_code() {
#if defined(FD_SM90A)
  return true;
#else
  return false;
#endif
}

void tiles_wgmma(const TilesJob& job, int tile_tokens, int multiprocessors, cudaStream_t stream) {
  switch (job.w.coding) {
    case Coding::kCcq:
      if (job.w.proven)
        return launch<Coding::kCcq, false>(job, tile_tokens, multiprocessors, stream);
      return launch<Coding::kCcq, true>(job, tile_tokens, multiprocessors, stream);
    case Coding::kInt4:
      return launch<Coding::kInt4, false>(job, tile_tokens, multiprocessors, stream);
    case Coding::kInt8:
      return launch<Coding::kInt8, false>(job, tile_tokens, multiprocessors, stream);
  }
}

}  // namespace fd::cuda
