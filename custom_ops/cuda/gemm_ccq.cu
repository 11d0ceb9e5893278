// Instances of the tiled products for one kind of weight; one file each, so that they compile in
// parallel.
#include "gemm.cuh"

namespace fd::cuda {

template void run_gemm<Kind::kCcq, false>(const TiledWeight&, const GemmParams&, int, int,
                                          cudaStream_t);

}  // namespace fd::cuda
