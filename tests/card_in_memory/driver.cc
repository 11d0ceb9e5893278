// What the plug-in asks of the CUDA run-time, for a card that is a piece of main memory. Calls on a
// stream do their work before they return; those without one as late as CUDA allows, so that who
// does not wait for them finds old bytes. With it Paddle has the place `nvidia:0` on any machine.
//
// Who plays the project's kernels says with `when_synchronized` what does their queued work.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

namespace {

constexpr size_t kAlignment = 512;

template <typename Handle>
cudaError_t make(Handle* handle) {
  *handle = reinterpret_cast<Handle>(std::malloc(1));
  return cudaSuccess;
}

cudaError_t destroy(void* handle) {
  std::free(handle);
  return cudaSuccess;
}

cudaError_t set(int* value, int to) {
  *value = to;
  return cudaSuccess;
}

cudaError_t move(void* to, const void* from, size_t bytes) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

/// Work of the default stream.
class Late {
 public:
  cudaError_t put(std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(guard_);
    work_.push_back(std::move(work));
    return cudaSuccess;
  }
  cudaError_t finish() {
    const std::lock_guard<std::mutex> lock(guard_);
    for (const std::function<void()>& work : work_) work();
    work_.clear();
    return cudaSuccess;
  }

 private:
  std::mutex guard_;
  std::vector<std::function<void()>> work_;
} late;

void (*do_queued_work)() = nullptr;

}  // namespace

extern "C" {
__attribute__((visibility("default"))) void when_synchronized(void (*work)()) {
  do_queued_work = work;
}

cudaError_t cudaGetDeviceCount(int* count) { return set(count, 1); }
cudaError_t cudaGetDevice(int* device) { return set(device, 0); }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return set(value, 9); }
cudaError_t cudaDriverGetVersion(int* version) { return set(version, CUDART_VERSION); }
cudaError_t cudaRuntimeGetVersion(int* version) { return set(version, CUDART_VERSION); }
cudaError_t cudaDeviceSynchronize() {
  if (do_queued_work != nullptr) do_queued_work();
  return late.finish();
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the card in memory"; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return destroy(stream); }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return stream == cudaStreamLegacy ? late.finish() : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return make(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return destroy(event); }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = size_t{20} << 30;
  *total = size_t{24} << 30;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  *pointer = std::aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment);
  return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return destroy(pointer); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return cudaMallocAsync(pointer, bytes, nullptr);
}
cudaError_t cudaFreeHost(void* pointer) { return destroy(pointer); }

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return late.put([=] { std::memset(to, value, bytes); });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (kind == cudaMemcpyDeviceToHost) return late.finish(), move(to, from, bytes);
  if (kind == cudaMemcpyDeviceToDevice) return late.put([=] { std::memmove(to, from, bytes); });
  const auto* first = static_cast<const unsigned char*>(from);
  std::vector<unsigned char> staged(first, first + bytes);
  return late.put(
      [to, staged = std::move(staged)] { std::memcpy(to, staged.data(), staged.size()); });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  return move(to, from, bytes);
}
cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t bytes) {
  return late.put([=] { std::memmove(to, from, bytes); });
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) {
  return move(to, from, bytes);
}
}
