// One instance; a file each, so that they compile in parallel.
#include "gemm_hopper.cuh"

namespace fd::cuda {

template void launch_hopper<Kind::kInt4>(const HopperJob&, int, cudaStream_t);

}  // namespace fd::cuda
