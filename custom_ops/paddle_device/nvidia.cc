// An NVIDIA card as a pluggable device of Paddle's CPU build, type name "nvidia" (names with "cuda"
// or "gpu" in them are rewritten by Paddle). Tensors, copies, streams and events work; kernels come
// from _ops_cuda, and Paddle falls back to the host for anything else.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "device_abi.h"

namespace fd::paddle_abi {
namespace {

constexpr size_t kMinChunk = 512;  // bytes; what cudaMalloc aligns to at least, too

Status report(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return kSuccess;
  std::fprintf(stderr, "nvidia plug-in: %s: %s\n", what, cudaGetErrorString(status));
  return kFailed;
}

cudaStream_t native(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }
cudaEvent_t native(Event event) { return reinterpret_cast<cudaEvent_t>(event); }

/// Makes `device` current for one call and restores what was current.
class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) {
    cudaGetDevice(&previous_);
    if (previous_ != device->id) cudaSetDevice(device->id);
    changed_ = previous_ != device->id;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

/// Memory of one card: the driver's stream-ordered pool, used on a stream of its own.
///
/// Paddle names no stream when it allocates or frees, so the order is kept with events: a freed
/// block may be handed out again only behind everything queued so far on every stream, and the
/// streams wait for the allocation. Nothing waits on the host.
class Memory {
 public:
  Status allocate(int device, void** pointer, size_t size) {
    const std::lock_guard<std::mutex> lock(guard_);
    if (const Status status = open(device); status != kSuccess) return status;
    const cudaError_t result = cudaMallocAsync(pointer, size, own_);
    if (result == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // Paddle frees its idle chunks and tries again, or raises
      return kFailed;
    }
    if (result != cudaSuccess) return report(result, "allocate");
    return order(own_, /*own_first=*/true);
  }

  Status release(int device, void* pointer) {
    const std::lock_guard<std::mutex> lock(guard_);
    if (const Status status = open(device); status != kSuccess) return status;
    if (const Status status = order(own_, /*own_first=*/false); status != kSuccess) return status;
    return report(cudaFreeAsync(pointer, own_), "free");
  }

  void add(cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(guard_);
    streams_.push_back(stream);
  }

  void remove(cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(guard_);
    for (size_t i = 0; i < streams_.size(); ++i) {
      if (streams_[i] == stream) {
        streams_.erase(streams_.begin() + static_cast<std::ptrdiff_t>(i));
        return;
      }
    }
  }

 private:
  Status open(int device) {
    if (own_ != nullptr) return kSuccess;
    cudaMemPool_t pool = nullptr;
    Status status = report(cudaDeviceGetDefaultMemPool(&pool, device), "memory pool");
    if (status != kSuccess) return status;
    uint64_t keep = UINT64_MAX;  // the pool gives nothing back: reuse must not cost a driver call
    status = report(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "pool");
    if (status != kSuccess) return status;
    status = report(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "event");
    if (status != kSuccess) return status;
    return report(cudaStreamCreateWithFlags(&own_, cudaStreamNonBlocking), "stream");
  }

  /// Puts all streams behind `own` or `own` behind all streams. A stream under capture takes no
  /// part: what it records runs only when its graph is launched.
  Status order(cudaStream_t own, bool own_first) {
    if (own_first && cudaEventRecord(event_, own) != cudaSuccess)
      return report(cudaGetLastError(), "order");
    for (cudaStream_t stream : streams_) {
      cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
      if (cudaStreamIsCapturing(stream, &capturing) != cudaSuccess ||
          capturing != cudaStreamCaptureStatusNone) {
        cudaGetLastError();
        if (own_first) {
          const Status status = report(cudaStreamSynchronize(own), "order: wait");
          if (status != kSuccess) return status;
        }
        continue;
      }
      cudaError_t result =
          own_first ? cudaStreamWaitEvent(stream, event_, 0) : cudaEventRecord(event_, stream);
      if (result == cudaSuccess && !own_first) result = cudaStreamWaitEvent(own, event_, 0);
      if (result != cudaSuccess) return report(result, "order");
    }
    return kSuccess;
  }

  std::mutex guard_;
  cudaStream_t own_ = nullptr;
  cudaEvent_t event_ = nullptr;
  std::vector<cudaStream_t> streams_;
};

/// One per card, never destroyed: Paddle frees tensors while static objects die.
Memory& memory_of(int device) {
  static std::mutex guard;
  static auto* const cards = new std::unordered_map<int, Memory>;
  const std::lock_guard<std::mutex> lock(guard);
  return (*cards)[device];
}

Status initialize() { return kSuccess; }
Status finalize() { return kSuccess; }

Status set_device(Device device) { return report(cudaSetDevice(device->id), "set device"); }
Status init_device(Device device) { return set_device(device); }
Status get_device(Device device) { return report(cudaGetDevice(&device->id), "get device"); }
Status deinit_device(Device) { return kSuccess; }

Status create_stream(Device device, Stream* stream) {
  const DeviceGuard guard(device);
  cudaStream_t made = nullptr;
  const Status status =
      report(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "create stream");
  if (status == kSuccess) memory_of(device->id).add(made);
  *stream = reinterpret_cast<Stream>(made);
  return status;
}

Status destroy_stream(Device device, Stream stream) {
  const DeviceGuard guard(device);
  memory_of(device->id).remove(native(stream));
  const cudaError_t status = cudaStreamDestroy(native(stream));
  return status == cudaErrorCudartUnloading ? kSuccess : report(status, "destroy stream");
}

Status query(cudaError_t status, const char* what) {
  return status == cudaErrorNotReady ? kFailed : report(status, what);
}

Status query_stream(Device device, Stream stream) {
  const DeviceGuard guard(device);
  return query(cudaStreamQuery(native(stream)), "query stream");
}

struct HostCall {
  DeviceId device;
  Stream stream;
  Callback callback;
  void* data;
};

void run_host_call(void* data) {
  auto* call = static_cast<HostCall*>(data);
  Status status = kSuccess;
  call->callback(&call->device, call->stream, call->data, &status);
  delete call;
}

Status stream_add_callback(Device device, Stream stream, Callback callback, void* data) {
  const DeviceGuard guard(device);
  auto* call = new HostCall{*device, stream, callback, data};
  const cudaError_t status = cudaLaunchHostFunc(native(stream), run_host_call, call);
  if (status != cudaSuccess) delete call;
  return report(status, "stream callback");
}

Status create_event(Device device, Event* event) {
  const DeviceGuard guard(device);
  return report(
      cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event), cudaEventDisableTiming),
      "create event");
}

Status record_event(Device device, Stream stream, Event event) {
  const DeviceGuard guard(device);
  return report(cudaEventRecord(native(event), native(stream)), "record event");
}

Status destroy_event(Device device, Event event) {
  const DeviceGuard guard(device);
  const cudaError_t status = cudaEventDestroy(native(event));
  return status == cudaErrorCudartUnloading ? kSuccess : report(status, "destroy event");
}

Status query_event(Device device, Event event) {
  const DeviceGuard guard(device);
  return query(cudaEventQuery(native(event)), "query event");
}

Status synchronize_device(Device device) {
  const DeviceGuard guard(device);
  return report(cudaDeviceSynchronize(), "synchronize device");
}

Status synchronize_stream(Device device, Stream stream) {
  const DeviceGuard guard(device);
  return report(cudaStreamSynchronize(native(stream)), "synchronize stream");
}

Status synchronize_event(Device device, Event event) {
  const DeviceGuard guard(device);
  return report(cudaEventSynchronize(native(event)), "synchronize event");
}

Status stream_wait_event(Device device, Stream stream, Event event) {
  const DeviceGuard guard(device);
  return report(cudaStreamWaitEvent(native(stream), native(event), 0), "stream wait");
}

Status device_memory_allocate(Device device, void** pointer, size_t size) {
  const DeviceGuard guard(device);
  return memory_of(device->id).allocate(device->id, pointer, size);
}

Status device_memory_deallocate(Device device, void* pointer, size_t) {
  const DeviceGuard guard(device);
  return memory_of(device->id).release(device->id, pointer);
}

/// Waits for what a call without a stream has begun. CUDA lets it return before the bytes are
/// there (a fill, a copy from pageable memory or inside the card), and its default stream is one
/// that the streams made here do not wait for.
Status finish(cudaError_t begun, const char* what) {
  const Status status = report(begun, what);
  return status == kSuccess ? report(cudaStreamSynchronize(cudaStreamLegacy), what) : status;
}

Status device_memory_set(Device device, void* pointer, unsigned char value, size_t size) {
  const DeviceGuard guard(device);
  return finish(cudaMemset(pointer, value, size), "memset");
}

Status host_memory_allocate(Device device, void** pointer, size_t size) {
  const DeviceGuard guard(device);
  return report(cudaHostAlloc(pointer, size, cudaHostAllocPortable), "pinned memory");
}

Status host_memory_deallocate(Device device, void* pointer, size_t) {
  const DeviceGuard guard(device);
  return report(cudaFreeHost(pointer), "free pinned memory");
}

/// The blocking copies run after all work of the card and before what comes, as Paddle's own
/// backends do: the caller names no stream.
Status copy(Device device, void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  const DeviceGuard guard(device);
  const Status status = report(cudaDeviceSynchronize(), "copy: wait");
  return status == kSuccess ? finish(cudaMemcpy(to, from, size, kind), "copy") : status;
}

Status memory_copy_h2d(Device device, void* to, const void* from, size_t size) {
  return copy(device, to, from, size, cudaMemcpyHostToDevice);
}
Status memory_copy_d2h(Device device, void* to, const void* from, size_t size) {
  return copy(device, to, from, size, cudaMemcpyDeviceToHost);
}
Status memory_copy_d2d(Device device, void* to, const void* from, size_t size) {
  return copy(device, to, from, size, cudaMemcpyDeviceToDevice);
}
Status memory_copy_p2p(Device to_device, Device from_device, void* to, const void* from,
                       size_t size) {
  const DeviceGuard guard(to_device);
  return finish(cudaMemcpyPeer(to, to_device->id, from, from_device->id, size), "peer copy");
}

Status copy_async(Device device, Stream stream, void* to, const void* from, size_t size,
                  cudaMemcpyKind kind) {
  const DeviceGuard guard(device);
  return report(cudaMemcpyAsync(to, from, size, kind, native(stream)), "async copy");
}

Status async_memory_copy_h2d(Device device, Stream stream, void* to, const void* from,
                             size_t size) {
  return copy_async(device, stream, to, from, size, cudaMemcpyHostToDevice);
}
Status async_memory_copy_d2h(Device device, Stream stream, void* to, const void* from,
                             size_t size) {
  return copy_async(device, stream, to, from, size, cudaMemcpyDeviceToHost);
}
Status async_memory_copy_d2d(Device device, Stream stream, void* to, const void* from,
                             size_t size) {
  return copy_async(device, stream, to, from, size, cudaMemcpyDeviceToDevice);
}
Status async_memory_copy_p2p(Device to_device, Device from_device, Stream stream, void* to,
                             const void* from, size_t size) {
  return report(cudaMemcpyPeerAsync(to, to_device->id, from, from_device->id, size, native(stream)),
                "async peer copy");
}

Status get_device_count(size_t* count) {
  int found = 0;
  if (cudaGetDeviceCount(&found) != cudaSuccess) {
    cudaGetLastError();
    found = 0;
  }
  *count = static_cast<size_t>(found);
  return kSuccess;
}

Status get_device_list(size_t* devices) {
  size_t count = 0;
  get_device_count(&count);
  for (size_t i = 0; i < count; ++i) devices[i] = i;
  return kSuccess;
}

Status device_memory_stats(Device device, size_t* total, size_t* free) {
  const DeviceGuard guard(device);
  return report(cudaMemGetInfo(free, total), "memory stats");
}

Status device_min_chunk_size(Device, size_t* size) {
  *size = kMinChunk;
  return kSuccess;
}

Status attribute(Device device, cudaDeviceAttr which, size_t* value) {
  int found = 0;
  const Status status = report(cudaDeviceGetAttribute(&found, which, device->id), "attribute");
  *value = static_cast<size_t>(found);
  return status;
}

Status get_compute_capability(Device device, size_t* capability) {
  size_t major = 0, minor = 0;
  const Status status = attribute(device, cudaDevAttrComputeCapabilityMajor, &major);
  if (status != kSuccess) return status;
  const Status second = attribute(device, cudaDevAttrComputeCapabilityMinor, &minor);
  *capability = major * 10 + minor;
  return second;
}

Status get_runtime_version(Device, size_t* version) {
  int found = 0;
  const Status status = report(cudaRuntimeGetVersion(&found), "runtime version");
  *version = static_cast<size_t>(found);
  return status;
}

Status get_driver_version(Device, size_t* version) {
  int found = 0;
  const Status status = report(cudaDriverGetVersion(&found), "driver version");
  *version = static_cast<size_t>(found);
  return status;
}

Status get_multi_process(Device device, size_t* count) {
  return attribute(device, cudaDevAttrMultiProcessorCount, count);
}
Status get_max_threads_per_mp(Device device, size_t* count) {
  return attribute(device, cudaDevAttrMaxThreadsPerMultiProcessor, count);
}
Status get_max_threads_per_block(Device device, size_t* count) {
  return attribute(device, cudaDevAttrMaxThreadsPerBlock, count);
}

Status get_max_grid_dim_size(Device device, std::array<unsigned int, 3>* sizes) {
  const cudaDeviceAttr axes[3] = {cudaDevAttrMaxGridDimX, cudaDevAttrMaxGridDimY,
                                  cudaDevAttrMaxGridDimZ};
  for (size_t i = 0; i < 3; ++i) {
    size_t size = 0;
    const Status status = attribute(device, axes[i], &size);
    if (status != kSuccess) return status;
    (*sizes)[i] = static_cast<unsigned int>(size);
  }
  return kSuccess;
}

Status is_float16_supported(Device, bool* supported) {
  *supported = true;
  return kSuccess;
}

Status is_bfloat16_supported(Device device, bool* supported) {
  size_t capability = 0;
  const Status status = get_compute_capability(device, &capability);
  *supported = capability >= 80;
  return status;
}

void fill(DeviceInterface& table) {
  table.initialize = initialize;
  table.finalize = finalize;
  table.init_device = init_device;
  table.set_device = set_device;
  table.get_device = get_device;
  table.deinit_device = deinit_device;
  table.create_stream = create_stream;
  table.destroy_stream = destroy_stream;
  table.query_stream = query_stream;
  table.stream_add_callback = stream_add_callback;
  table.create_event = create_event;
  table.record_event = record_event;
  table.destroy_event = destroy_event;
  table.query_event = query_event;
  table.synchronize_device = synchronize_device;
  table.synchronize_stream = synchronize_stream;
  table.synchronize_event = synchronize_event;
  table.stream_wait_event = stream_wait_event;
  table.device_memory_allocate = device_memory_allocate;
  table.device_memory_deallocate = device_memory_deallocate;
  table.device_memory_set = device_memory_set;
  table.host_memory_allocate = host_memory_allocate;
  table.host_memory_deallocate = host_memory_deallocate;
  table.memory_copy_h2d = memory_copy_h2d;
  table.memory_copy_d2h = memory_copy_d2h;
  table.memory_copy_d2d = memory_copy_d2d;
  table.memory_copy_p2p = memory_copy_p2p;
  table.async_memory_copy_h2d = async_memory_copy_h2d;
  table.async_memory_copy_d2h = async_memory_copy_d2h;
  table.async_memory_copy_d2d = async_memory_copy_d2d;
  table.async_memory_copy_p2p = async_memory_copy_p2p;
  table.get_device_count = get_device_count;
  table.get_device_list = get_device_list;
  table.device_memory_stats = device_memory_stats;
  table.device_min_chunk_size = device_min_chunk_size;
  table.get_compute_capability = get_compute_capability;
  table.get_runtime_version = get_runtime_version;
  table.get_driver_version = get_driver_version;
  table.get_multi_process = get_multi_process;
  table.get_max_threads_per_mp = get_max_threads_per_mp;
  table.get_max_threads_per_block = get_max_threads_per_block;
  table.get_max_grid_dim_size = get_max_grid_dim_size;
  table.is_float16_supported = is_float16_supported;
  table.is_bfloat16_supported = is_bfloat16_supported;
}

}  // namespace
}  // namespace fd::paddle_abi

/// Called by Paddle for every shared object below CUSTOM_DEVICE_ROOT.
extern "C" __attribute__((visibility("default"))) void InitPlugin(
    fd::paddle_abi::RuntimeParams* params) {
  using namespace fd::paddle_abi;
  static char type[] = "nvidia";
  static char sub_type[] = "v1";
  if (params->size < sizeof(RuntimeParams) || params->interface->size < sizeof(DeviceInterface)) {
    std::fprintf(stderr, "nvidia plug-in: this Paddle's device interface is older than 3.2\n");
    return;
  }
  params->version = kInterfaceVersion;
  params->device_type = type;
  params->sub_device_type = sub_type;
  fill(*params->interface);
}
