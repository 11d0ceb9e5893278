#include "runtime.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "common.cuh"

namespace fd::cuda {
namespace {

constexpr int64_t kRingBytes = int64_t{16} << 20;
constexpr int kRingBuffers = 4;
constexpr int kCopyThreads =
    4;  // one core reads a mapped file at about 5 GB/s, a PCIe 5 link takes 50
constexpr int64_t kSmallCopy = 1 << 20;

/// Pinned buffers that take turns; one is reused when its last transfer has finished.
class PinnedRing {
 public:
  void upload(char* device, const char* host, int64_t bytes, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(guard_);
    open();
    for (int64_t done = 0; done < bytes; done += kRingBytes) {
      const int64_t part = std::min(kRingBytes, bytes - done);
      Buffer& buffer = buffers_[next_];
      next_ = (next_ + 1) % kRingBuffers;
      check(cudaEventSynchronize(buffer.idle), "upload: wait");
      fill(buffer.memory, host + done, part);
      check(cudaMemcpyAsync(device + done, buffer.memory, part, cudaMemcpyHostToDevice, stream),
            "upload");
      check(cudaEventRecord(buffer.idle, stream), "upload: record");
    }
  }

 private:
  struct Buffer {
    char* memory = nullptr;
    cudaEvent_t idle = nullptr;
  };

  void open() {
    if (!buffers_.empty()) return;
    std::vector<Buffer> fresh(kRingBuffers);
    for (Buffer& buffer : fresh) {
      check(cudaHostAlloc(reinterpret_cast<void**>(&buffer.memory), kRingBytes,
                          cudaHostAllocPortable),
            "upload: pinned memory");
      check(cudaEventCreateWithFlags(&buffer.idle, cudaEventDisableTiming), "upload: event");
    }
    buffers_ = std::move(fresh);
  }

  static void fill(char* to, const char* from, int64_t bytes) {
    if (bytes <= kSmallCopy) {
      std::memcpy(to, from, bytes);
      return;
    }
    std::vector<std::thread> workers;
    const int64_t share = ceil_div<int64_t>(bytes, kCopyThreads);
    for (int64_t begin = 0; begin < bytes; begin += share) {
      const int64_t size = std::min(share, bytes - begin);
      workers.emplace_back([=] { std::memcpy(to + begin, from + begin, size); });
    }
    for (std::thread& worker : workers) worker.join();
  }

  std::mutex guard_;
  std::vector<Buffer> buffers_;
  int next_ = 0;
};

/// Never destroyed: the driver may be gone when static objects die.
PinnedRing& ring() {
  static PinnedRing* const instance = new PinnedRing;
  return *instance;
}

}  // namespace

DeviceFacts device_facts(int device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "device properties");
  int previous = 0;
  check(cudaGetDevice(&previous), "current device");
  check(cudaSetDevice(device), "set device");
  size_t free_bytes = 0, total_bytes = 0;
  const cudaError_t status = cudaMemGetInfo(&free_bytes, &total_bytes);
  check(cudaSetDevice(previous), "set device");
  check(status, "memory info");
  return {properties.name,
          properties.major,
          properties.minor,
          properties.multiProcessorCount,
          static_cast<int64_t>(total_bytes),
          static_cast<int64_t>(free_bytes)};
}

void upload(void* device, const void* host, int64_t bytes, cudaStream_t stream) {
  ring().upload(static_cast<char*>(device), static_cast<const char*>(host), bytes, stream);
}

void download(void* host, const void* device, int64_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream), "download");
  check(cudaStreamSynchronize(stream), "download: wait");
}

void copy(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "copy");
}

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "allocate");
  return memory;
}

void release(void* memory) {
  const cudaError_t status = cudaFree(memory);
  // At exit the driver may have gone first.
  if (status != cudaErrorCudartUnloading) check(status, "release");
}

void* allocate_pinned(int64_t bytes) {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable), "allocate_pinned");
  return memory;
}

void free_pinned(void* memory) {
  const cudaError_t status = cudaFreeHost(memory);
  // At exit the driver may have gone first.
  if (status != cudaErrorCudartUnloading) check(status, "free_pinned");
}

void copy_to_pinned(void* pinned, const void* device, int64_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(pinned, device, bytes, cudaMemcpyDeviceToHost, stream), "copy_to_pinned");
}

void copy_from_pinned(void* device, const void* pinned, int64_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(device, pinned, bytes, cudaMemcpyHostToDevice, stream), "copy_from_pinned");
}

uint64_t create_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "create_event");
  return reinterpret_cast<uint64_t>(event);
}

void record_event(uint64_t event, cudaStream_t stream) {
  check(cudaEventRecord(reinterpret_cast<cudaEvent_t>(event), stream), "record_event");
}

void wait_event(uint64_t event) {
  check(cudaEventSynchronize(reinterpret_cast<cudaEvent_t>(event)), "wait_event");
}

void clear(void* to, int64_t bytes, cudaStream_t stream) {
  check(cudaMemsetAsync(to, 0, bytes, stream), "clear");
}

void synchronize(cudaStream_t stream) { check(cudaStreamSynchronize(stream), "synchronize"); }

double time_copy(void* to, const void* from, int64_t bytes, int repeats, cudaStream_t stream) {
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "time_copy: event");
  check(cudaEventCreate(&end), "time_copy: event");
  std::vector<float> times;
  for (int i = 0; i <= repeats; ++i) {  // the first run warms up
    check(cudaEventRecord(begin, stream), "time_copy: record");
    copy(to, from, bytes, stream);
    check(cudaEventRecord(end, stream), "time_copy: record");
    check(cudaEventSynchronize(end), "time_copy: wait");
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "time_copy: elapsed");
    if (i > 0) times.push_back(milliseconds);
  }
  check(cudaEventDestroy(begin), "time_copy: event");
  check(cudaEventDestroy(end), "time_copy: event");
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2] * 1e-3;
}

namespace {
std::atomic<bool> early_start_allowed{true};
/// A stream whose next kernel waits for another stream too, which an early start does not express.
thread_local cudaStream_t joined_stream = nullptr;
thread_local bool joins = false;
}  // namespace

void follow(cudaStream_t stream, cudaStream_t ahead) {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "follow: event");
  cudaError_t status = cudaEventRecord(event, ahead);
  if (status == cudaSuccess) status = cudaStreamWaitEvent(stream, event, 0);
  cudaEventDestroy(event);  // once both streams are past it
  check(status, "follow");
  joined_stream = stream;
  joins = true;
}

void allow_early_start(bool allowed) { early_start_allowed = allowed; }

bool starts_early(cudaStream_t stream) {
  if (joins && stream == joined_stream) {
    joins = false;
    return false;
  }
  static const bool able = [] {
    int device = 0, major = 0;
    check(cudaGetDevice(&device), "launch: device");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "launch");
    return major >= 9;
  }();
  return able && early_start_allowed;
}

uint64_t create_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create_stream");
  return reinterpret_cast<uint64_t>(stream);
}

void begin_capture(cudaStream_t stream) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin_capture");
}

uint64_t end_capture(cudaStream_t stream, bool discard) {
  cudaGraph_t graph = nullptr;
  const cudaError_t status = cudaStreamEndCapture(stream, &graph);
  if (discard) {
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();  // a failed capture leaves an error that is not the next launch's
    return 0;
  }
  check(status, "end_capture");
  size_t nodes = 0;
  const cudaError_t counted = cudaGraphGetNodes(graph, nullptr, &nodes);
  if (counted != cudaSuccess || nodes == 0) {
    cudaGraphDestroy(graph);
    check(counted, "end_capture: nodes");
    return 0;
  }
  cudaGraphExec_t executable = nullptr;
  const cudaError_t made = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(made, "end_capture: instantiate");
  return reinterpret_cast<uint64_t>(executable);
}

void launch_graph(uint64_t graph, cudaStream_t stream) {
  check(cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(graph), stream), "launch_graph");
}

void destroy_graph(uint64_t graph) {
  check(cudaGraphExecDestroy(reinterpret_cast<cudaGraphExec_t>(graph)), "destroy_graph");
}

}  // namespace fd::cuda
