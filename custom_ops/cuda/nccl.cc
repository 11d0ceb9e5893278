#include "nccl.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "common.cuh"

namespace fd::cuda {
namespace {

// The few declarations of NCCL 2 that are needed; its headers need not be there.
// Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html
struct UniqueId {
  char bytes[kNcclIdBytes];
};
constexpr int kSuccess = 0, kInt8 = 0, kFloat32 = 7, kBfloat16 = 9, kSum = 0;

struct Library {
  const char* (*error_string)(int) = nullptr;
  int (*version)(int*) = nullptr;
  int (*unique_id)(UniqueId*) = nullptr;
  int (*init_rank)(void**, int, UniqueId, int) = nullptr;
  int (*abort)(void*) = nullptr;
  int (*all_reduce)(const void*, void*, size_t, int, int, void*, cudaStream_t) = nullptr;
  int (*all_gather)(const void*, void*, size_t, int, void*, cudaStream_t) = nullptr;
  int (*send)(const void*, size_t, int, int, void*, cudaStream_t) = nullptr;
  int (*receive)(void*, size_t, int, int, void*, cudaStream_t) = nullptr;
  int (*group_start)() = nullptr;
  int (*group_end)() = nullptr;
};

Library library;
std::mutex guard;

// A host that is further ahead of its card waits here, where an abort is noticed, and not inside a
// launch for which the driver has no room.
constexpr int kCallsAhead = 48;
constexpr std::chrono::seconds kCallSeconds{1};
constexpr auto kLook = std::chrono::microseconds(20);
// Up to here every rank takes all parts of all others; beyond, it adds up its own share of the sum
// and the sums are gathered, which moves no more bytes than a ring does.
constexpr int64_t kGatheredBytes = int64_t{2} << 20;
constexpr int64_t kAlign = 8;  // elements: 16 bytes of bf16

void check_nccl(int status, const char* what) {
  if (status != kSuccess) {
    throw std::runtime_error(std::string("NCCL: ") + what + ": " + library.error_string(status));
  }
}

template <typename Function>
void resolve(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (function == nullptr) throw std::runtime_error(std::string("NCCL has no ") + name);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "NCCL: stream");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

void nccl_open(const std::string& path) {
  const std::lock_guard<std::mutex> lock(guard);
  if (library.init_rank != nullptr) return;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(std::string("NCCL: ") + dlerror());
  Library found;
  resolve(handle, "ncclGetErrorString", found.error_string);
  resolve(handle, "ncclGetVersion", found.version);
  resolve(handle, "ncclGetUniqueId", found.unique_id);
  resolve(handle, "ncclCommAbort", found.abort);
  resolve(handle, "ncclAllReduce", found.all_reduce);
  resolve(handle, "ncclAllGather", found.all_gather);
  resolve(handle, "ncclSend", found.send);
  resolve(handle, "ncclRecv", found.receive);
  resolve(handle, "ncclGroupStart", found.group_start);
  resolve(handle, "ncclGroupEnd", found.group_end);
  resolve(handle, "ncclCommInitRank", found.init_rank);
  library = found;
}

int nccl_version() {
  int version = 0;
  check_nccl(library.version(&version), "version");
  return version;
}

std::string nccl_unique_id() {
  UniqueId id{};
  check_nccl(library.unique_id(&id), "unique id");
  return std::string(id.bytes, sizeof(id.bytes));
}

NcclGroup::NcclGroup(const std::string& id, int rank, int ranks, int device)
    : rank_(rank), ranks_(ranks), device_(device), in_order_(ranks > 2) {
  UniqueId name{};
  if (id.size() != sizeof(name.bytes)) throw std::runtime_error("NCCL: an id has 128 bytes");
  std::memcpy(name.bytes, id.data(), sizeof(name.bytes));
  check(cudaSetDevice(device), "NCCL: device");
  check_nccl(library.init_rank(&group_, ranks, name, rank), "group");
  behind_.resize(kCallsAhead);
  for (cudaEvent_t& event : behind_) {
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "NCCL: event");
  }
}

/// As many bytes of each rank, in their order.
std::vector<std::string> NcclGroup::gather_words(const std::string& own) {
  const size_t bytes = own.size();
  std::string all(bytes * ranks_, '\0');
  cudaStream_t stream = nullptr;
  char* memory = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "NCCL: stream");
  check(cudaMalloc(reinterpret_cast<void**>(&memory), all.size()), "NCCL: memory");
  check(cudaMemcpyAsync(memory + rank_ * bytes, own.data(), bytes, cudaMemcpyHostToDevice, stream),
        "NCCL: words");
  check_nccl(library.all_gather(memory + rank_ * bytes, memory, bytes, kInt8, group_, stream),
             "words");
  check(cudaMemcpyAsync(all.data(), memory, all.size(), cudaMemcpyDeviceToHost, stream),
        "NCCL: words");
  check(cudaStreamSynchronize(stream), "NCCL: words");
  check(cudaFree(memory), "NCCL: memory");
  check(cudaStreamDestroy(stream), "NCCL: stream");
  std::vector<std::string> words;
  for (int rank = 0; rank < ranks_; ++rank) words.push_back(all.substr(rank * bytes, bytes));
  return words;
}

bool NcclGroup::share_memory() {
  check(cudaSetDevice(device_), "NCCL: device");
  peers_ = std::make_unique<PeerSums>(rank_, ranks_);
  const bool mine = peers_->connect(gather_words(peers_->name()));
  const std::vector<std::string> able = gather_words(mine ? "1" : "0");
  can_share_ =
      std::all_of(able.begin(), able.end(), [](const std::string& one) { return one == "1"; });
  return sharing_ = can_share_;
}

/// Keeps the host at most kCallsAhead calls ahead of the card; a capture runs nothing. Returns the
/// right to call NCCL.
std::unique_lock<std::timed_mutex> NcclGroup::enter(cudaStream_t stream) {
  if (!is_capturing(stream)) stay_near(stream);
  std::unique_lock<std::timed_mutex> lock(*calling_);
  if (aborted_) throw std::runtime_error("NCCL: the group was ended");
  return lock;
}

void NcclGroup::stay_near(cudaStream_t stream) {
  cudaEvent_t event = behind_[calls_++ % kCallsAhead];
  for (;;) {  // done at once for an event that was never recorded
    const cudaError_t status = cudaEventQuery(event);
    if (status == cudaSuccess) break;
    if (status != cudaErrorNotReady) check(status, "NCCL: wait");
    if (aborted_) throw std::runtime_error("NCCL: the group was ended");
    std::this_thread::sleep_for(kLook);
  }
  check(cudaEventRecord(event, stream), "NCCL: record");
}

void NcclGroup::all_reduce(void* x, bool is_float, int64_t count, void* scratch,
                           int64_t scratch_bytes, cudaStream_t stream) {
  const auto lock = enter(stream);
  if (sharing_ && peers_->takes(x, is_float, count)) {
    peers_->all_reduce(x, count, stream);
    return;
  }
  if (!in_order_) {
    const int type = is_float ? kFloat32 : kBfloat16;
    check_nccl(library.all_reduce(x, x, count, type, kSum, group_, stream), "all-reduce");
    return;
  }
  const int64_t size = is_float ? 4 : 2;
  const int64_t room = scratch_bytes / (size * ranks_) / kAlign * kAlign;  // elements of each rank
  const bool is_shared = count * size > kGatheredBytes && count % (ranks_ * kAlign) == 0;
  const int64_t at_once = is_shared ? room * ranks_ : room;
  for (int64_t begin = 0; begin < count; begin += at_once) {
    const int64_t part = std::min(at_once, count - begin);
    enqueue_sum(static_cast<char*>(x) + begin * size, is_float, part, scratch,
                is_shared ? part / ranks_ : 0, stream);
  }
}

/// Adds up one piece; `share`: elements that each rank adds, 0 when every rank adds all.
void NcclGroup::enqueue_sum(char* x, bool is_float, int64_t count, void* scratch, int64_t share,
                            cudaStream_t stream) {
  const int type = is_float ? kFloat32 : kBfloat16;
  const int64_t size = is_float ? 4 : 2;
  if (share == 0) {
    check_nccl(library.all_gather(x, scratch, count, type, group_, stream), "all-gather");
    sum_of_ranks(scratch, is_float, ranks_, count, x, stream);
    return;
  }
  char* parts = static_cast<char*>(scratch);
  check_nccl(library.group_start(), "exchange");
  for (int rank = 0; rank < ranks_; ++rank) {
    check_nccl(library.send(x + rank * share * size, share, type, rank, group_, stream), "send");
    check_nccl(library.receive(parts + rank * share * size, share, type, rank, group_, stream),
               "receive");
  }
  check_nccl(library.group_end(), "exchange");
  char* own = x + rank_ * share * size;
  sum_of_ranks(parts, is_float, ranks_, share, own, stream);
  check_nccl(library.all_gather(own, x, share, type, group_, stream), "all-gather");
}

void NcclGroup::all_gather(const float* x, int64_t rows, int64_t width, float* out, void* scratch,
                           int64_t scratch_bytes, cudaStream_t stream) {
  const int64_t row_bytes = ranks_ * width * int64_t{sizeof(float)};
  const int64_t at_once = scratch_bytes / row_bytes;
  if (at_once == 0) throw std::runtime_error("NCCL: a row does not fit in scratch memory");
  for (int64_t begin = 0; begin < rows; begin += at_once) {
    const int64_t count = std::min(at_once, rows - begin);
    const auto lock = enter(stream);
    float* to = out + begin * ranks_ * width;
    float* parts = count == 1 ? to : static_cast<float*>(scratch);
    check_nccl(
        library.all_gather(x + begin * width, parts, count * width, kFloat32, group_, stream),
        "all-gather");
    if (count > 1) side_by_side(parts, ranks_, count, width, to, stream);
  }
}

void NcclGroup::abort() {
  if (aborted_.exchange(true)) return;
  if (peers_ != nullptr) peers_->abort();
  // NCCL ends the kernels at once but returns only when no graph holds the group any more.
  std::thread([group = group_, device = device_, calling = calling_, ended = ended_] {
    // A call that does not come back waits for a rank that is gone: only the abort frees it.
    const std::unique_lock<std::timed_mutex> lock(*calling, kCallSeconds);
    cudaSetDevice(device);
    library.abort(group);
    *ended = true;
  }).detach();
}

bool NcclGroup::wait_idle(double seconds, cudaStream_t stream) const {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  while (!aborted_) {
    if (cudaStreamQuery(stream) != cudaErrorNotReady) return true;
    if (Clock::now() > end) return false;
    std::this_thread::sleep_for(kLook);
  }
  return false;
}

}  // namespace fd::cuda
