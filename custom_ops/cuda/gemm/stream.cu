// Launches the persistent kernel for a coding known at run time.
#include "stream.cuh"

namespace fd::cuda {

extern template void launch_stream_of<Coding::kCcq>(const StreamJob&, int, cudaStream_t);
extern template void launch_stream_of<Coding::kInt4>(const StreamJob&, int, cudaStream_t);
extern template void launch_stream_of<Coding::kInt8>(const StreamJob&, int, cudaStream_t);

void launch_stream(const StreamJob& job, int multiprocessors, cudaStream_t queue) {
  switch (job.call.up_gate.coding) {
    case Coding::kCcq:
      return launch_stream_of<Coding::kCcq>(job, multiprocessors, queue);
    case Coding::kInt4:
      return launch_stream_of<Coding::kInt4>(job, multiprocessors, queue);
    case Coding::kInt8:
      return launch_stream_of<Coding::kInt8>(job, multiprocessors, queue);
  }
}

}  // namespace fd::cuda
