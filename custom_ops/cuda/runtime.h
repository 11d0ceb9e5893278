// What the ops need around them: host-device copies through pinned memory, graphs, facts about the
// card.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace fd::cuda {

struct DeviceFacts {
  std::string name;
  int major;
  int minor;
  int multiprocessors;
  int64_t total_bytes;
  int64_t free_bytes;
};
DeviceFacts device_facts(int device);

/// Copies host memory of any kind (such as a mapped file) to the card through a ring of pinned
/// buffers, so that reading the source and the transfer overlap. Returns when the source has been
/// read; the copy is ordered on `stream`.
void upload(void* device, const void* host, int64_t bytes, cudaStream_t stream);
/// Copies to the host and waits.
void download(void* host, const void* device, int64_t bytes, cudaStream_t stream);
void copy(void* to, const void* from, int64_t bytes, cudaStream_t stream);
/// Memory of the card, outside Paddle's pools.
void* allocate(int64_t bytes);
void release(void* memory);
/// Page-locked host memory.
void* allocate_pinned(int64_t bytes);
void free_pinned(void* memory);
/// Between a card and page-locked memory, queued: the host goes on.
void copy_to_pinned(void* pinned, const void* device, int64_t bytes, cudaStream_t stream);
void copy_from_pinned(void* device, const void* pinned, int64_t bytes, cudaStream_t stream);
/// An event without timing that lives as long as the process.
uint64_t create_event();
void record_event(uint64_t event, cudaStream_t stream);
/// The host waits for the event's last record.
void wait_event(uint64_t event);
/// Zeros.
void clear(void* to, int64_t bytes, cudaStream_t stream);
void synchronize(cudaStream_t stream);

/// Seconds for one device-to-device copy of `bytes`, median of `repeats`, and so the card's copy
/// bandwidth.
double time_copy(void* to, const void* from, int64_t bytes, int repeats, cudaStream_t stream);

/// Whether kernels are launched to start early where the card can; true at first. For measurements.
void allow_early_start(bool allowed);

/// A stream that waits for no other and lives as long as the process; graphs are captured on one.
uint64_t create_stream();

/// What is queued on `stream` from now on waits for what is queued on `ahead`; so a capture of one
/// takes in the other, until that has followed back.
void follow(cudaStream_t stream, cudaStream_t ahead);

/// A captured sequence of kernels.
void begin_capture(cudaStream_t stream);
/// Ends the capture and returns a handle for launch_graph; 0 if `discard`, or if nothing was
/// queued.
uint64_t end_capture(cudaStream_t stream, bool discard);
void launch_graph(uint64_t graph, cudaStream_t stream);
void destroy_graph(uint64_t graph);

}  // namespace fd::cuda
