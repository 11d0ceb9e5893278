// One instance; a file each, so that they compile in parallel.
#include "stream.cuh"

namespace fd::cuda {

template void launch_stream_of<stream::Halves<Coding::kInt4>>(const StreamJob&, int, cudaStream_t);

}  // namespace fd::cuda
