#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "peer_sums.cuh"
#include "peer_sums.h"

namespace fd::cuda {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) peer_sum_kernel(const __grid_constant__ PeerJob job) {
  wait_for_inputs();
  sum_with_peers(job, blockIdx.x, gridDim.x);
}

__global__ void __launch_bounds__(kThreads)
    peer_message_kernel(const __grid_constant__ PeerJob job) {
  wait_for_inputs();
  sum_by_messages(job, blockIdx.x, gridDim.x);
}

/// Memory that others have mapped is never freed, as they may outlive its use: what a group leaves
/// behind, the next one takes.
struct Memory {
  PeerHead* head = nullptr;
  unsigned* is_aborted = nullptr;
  int device = -1;
};

std::mutex guard;
std::vector<Memory> left_behind;
std::map<std::string, PeerHead*> mapped;

/// False where the card has no room: sums go another way then.
bool take_memory(Memory& memory) {
  check(cudaGetDevice(&memory.device), "sums of peers: device");
  const std::lock_guard<std::mutex> lock(guard);
  const auto known = std::find_if(left_behind.begin(), left_behind.end(),
                                  [&](const Memory& one) { return one.device == memory.device; });
  if (known != left_behind.end()) {
    memory = *known;
    left_behind.erase(known);
    return true;
  }
  if (cudaMalloc(reinterpret_cast<void**>(&memory.head), kPeerMemoryBytes) == cudaSuccess) {
    if (cudaHostAlloc(reinterpret_cast<void**>(&memory.is_aborted), sizeof(unsigned),
                      cudaHostAllocMapped) == cudaSuccess) {
      return true;
    }
    cudaFree(memory.head);
  }
  cudaGetLastError();
  return false;
}

/// A host's name for as long as it runs: memory of another one cannot be mapped.
std::string boot_id() {
  char id[64] = {};
  std::FILE* const file = std::fopen("/proc/sys/kernel/random/boot_id", "r");
  if (file == nullptr) return "";
  const bool is_read = std::fgets(id, sizeof(id), file) != nullptr;
  std::fclose(file);
  return is_read ? id : "";
}

/// The same process cannot map a memory twice.
PeerHead* map_memory(const std::string& handle) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto known = mapped.find(handle);
  if (known != mapped.end()) return known->second;
  cudaIpcMemHandle_t raw;
  std::memcpy(&raw, handle.data(), sizeof(raw));
  void* found = nullptr;
  if (cudaIpcOpenMemHandle(&found, raw, cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) {
    cudaGetLastError();  // this way is closed, and no fault of what comes next
    return nullptr;
  }
  return mapped[handle] = static_cast<PeerHead*>(found);
}

}  // namespace

PeerSums::PeerSums(int rank, int ranks) {
  job_.rank = rank;
  job_.ranks = ranks;
  Memory memory;
  if (ranks > kMostPeers || !take_memory(memory)) return;
  *memory.is_aborted = 0;
  void* seen = nullptr;
  check(cudaHostGetDevicePointer(&seen, memory.is_aborted, 0), "sums of peers: host memory");
  check(cudaMemset(memory.head, 0, kPeerMemoryBytes), "sums of peers: clear");
  check(cudaDeviceSynchronize(), "sums of peers: clear");
  job_.is_aborted = static_cast<const unsigned*>(seen);
  job_.heads[rank] = memory.head;
  is_aborted_ = memory.is_aborted;
  device_ = memory.device;
}

PeerSums::~PeerSums() {
  if (is_aborted_ == nullptr) return;
  const std::lock_guard<std::mutex> lock(guard);
  left_behind.push_back({job_.heads[job_.rank], is_aborted_, device_});
}

std::string PeerSums::name() const {
  std::string text(kPeerNameBytes, '\0');
  cudaIpcMemHandle_t handle{};
  if (is_aborted_ == nullptr ||
      cudaIpcGetMemHandle(&handle, job_.heads[job_.rank]) != cudaSuccess) {
    cudaGetLastError();
    return text;
  }
  std::memcpy(text.data(), &handle, sizeof(handle));
  const std::string host = boot_id();
  const size_t room = kPeerNameBytes - sizeof(handle) - 1;
  host.copy(text.data() + sizeof(handle), std::min(room, host.size()));
  return text;
}

bool PeerSums::connect(const std::vector<std::string>& names) {
  const std::string nothing(kPeerNameBytes, '\0');
  for (int rank = 0; rank < static_cast<int>(names.size()); ++rank) {
    constexpr size_t kHandle = sizeof(cudaIpcMemHandle_t);
    if (names[rank] == nothing || names[rank].substr(kHandle) != names[job_.rank].substr(kHandle)) {
      return false;
    }
    if (rank == job_.rank) continue;
    job_.heads[rank] = map_memory(names[rank].substr(0, kHandle));
    if (job_.heads[rank] == nullptr) return false;
  }
  return connected_ = true;
}

bool PeerSums::takes(const void* x, bool is_float, int64_t count) const {
  return connected_ && !is_float && count % 8 == 0 && count * 2 <= kPeerBytes &&
         reinterpret_cast<uintptr_t>(x) % sizeof(uint4) == 0;
}

void PeerSums::all_reduce(void* x, int64_t count, cudaStream_t stream) {
  PeerJob job = job_;
  job.x = static_cast<uint4*>(x);
  job.vectors = count / 8;
  const int64_t wanted = ceil_div<int64_t>(job.vectors, kThreads);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(wanted, kMostPeerBlocks));
  const bool sends = count * 2 <= kMessageBytes;
  launch("sum with peers", sends ? peer_message_kernel : peer_sum_kernel, blocks, kThreads, 0,
         stream, job);
}

void PeerSums::abort() {
  if (is_aborted_ != nullptr) *static_cast<volatile unsigned*>(is_aborted_) = 1;
}

}  // namespace fd::cuda
