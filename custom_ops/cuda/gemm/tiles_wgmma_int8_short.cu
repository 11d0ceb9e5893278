// One instance; a file each, so that they compile in parallel.
#include "tiles_wgmma.cuh"

namespace fd::cuda {

template void launch_tiles_wgmma<Coding::kInt8, tiles::Short>(const TilesJob&, int, cudaStream_t);

}  // namespace fd::cuda
