// Launches the persistent kernel for a coding and an arithmetic known at run time.
#include "stream.cuh"

namespace fd::cuda {

using stream::Digits, stream::Halves;
extern template void launch_stream_of<Halves<Coding::kCcq>>(const StreamJob&, int, cudaStream_t);
extern template void launch_stream_of<Halves<Coding::kInt4>>(const StreamJob&, int, cudaStream_t);
extern template void launch_stream_of<Halves<Coding::kInt8>>(const StreamJob&, int, cudaStream_t);
extern template void launch_stream_of<Digits>(const StreamJob&, int, cudaStream_t);

void launch_stream(const StreamJob& job, int multiprocessors, cudaStream_t queue) {
  if (job.digits) return launch_stream_of<Digits>(job, multiprocessors, queue);
  switch (job.call.up_gate.coding) {
    case Coding::kCcq:
      return launch_stream_of<Halves<Coding::kCcq>>(job, multiprocessors, queue);
    case Coding::kInt4:
      return launch_stream_of<Halves<Coding::kInt4>>(job, multiprocessors, queue);
    case Coding::kInt8:
      return launch_stream_of<Halves<Coding::kInt8>>(job, multiprocessors, queue);
  }
}

}  // namespace fd::cuda
