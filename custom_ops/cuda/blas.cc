// Dense bf16 products through cuBLASLt, opened at run time: the module loads, and everything but
// dense linears works, on a machine without it, and the library may come from the toolkit or from
// the nvidia-cublas wheel.
#include <cublasLt.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <tuple>

#include "common.cuh"
#include "ops.h"

namespace fd::cuda {
namespace {

struct Library {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
};

/// A problem that was seen before: descriptors and the algorithm that cuBLASLt proposed for it.
struct Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
};

constexpr int kTokenStep = 16;

using PlanKey = std::tuple<int, int, int, int, bool>;  // device, tokens, K, N, float out

Library library;
std::map<int, cublasLtHandle_t> handles;
std::map<PlanKey, Plan> plans;
std::mutex guard;

void check_blas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error(std::string("linear: cuBLASLt ") + what + " failed with status " +
                             std::to_string(static_cast<int>(status)));
  }
}

template <typename Function>
void resolve(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (function == nullptr) throw std::runtime_error(std::string("cuBLASLt has no ") + name);
}

cublasLtHandle_t handle_of(int device) {
  cublasLtHandle_t& handle = handles[device];
  if (handle == nullptr) check_blas(library.create(&handle), "create");
  return handle;
}

/// The algorithm for a problem, chosen so that a row's result does not depend on how many rows are
/// multiplied together. Without reduction schemes K is never split, and each sum runs through K in
/// the order of the tensor core's steps, whatever the tile: tests/gpu/test_cuda_invariance.py holds
/// all sizes to the same bits. On an H100 it wins or loses a few percent, 12 at most (1,024 rows
/// through [28672, 8192]). For some counts that are no multiples of 16 the heuristic then proposes
/// an old kernel, three times slower for 12 rows, so `b` and `c` describe the count rounded up; the
/// algorithm serves the true one.
cublasLtMatmulAlgo_t choose_algorithm(cublasLtHandle_t handle, const Plan& plan,
                                      cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                      size_t workspace_bytes) {
  const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
  cublasLtMatmulPreference_t preference = nullptr;
  check_blas(library.preference_create(&preference), "preference");
  check_blas(library.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                    &workspace_bytes, sizeof(workspace_bytes)),
             "workspace limit");
  check_blas(library.preference_set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                    &reduction, sizeof(reduction)),
             "reduction schemes");
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status =
      library.heuristic(handle, plan.operation, plan.a, b, c, c, preference, 1, &found, &count);
  library.preference_destroy(preference);
  check_blas(status, "heuristic");
  if (count == 0) throw std::runtime_error("linear: cuBLASLt proposes no algorithm");
  return found.algo;
}

/// cuBLASLt is column major: out^T [N, tokens] = rows [K, N]^T x x^T [K, tokens].
Plan make_plan(cublasLtHandle_t handle, int tokens, int in_features, int out_features,
               bool out_is_float, size_t workspace_bytes) {
  Plan plan;
  const cublasOperation_t transpose = CUBLAS_OP_T;
  const cudaDataType_t out_type = out_is_float ? CUDA_R_32F : CUDA_R_16BF;
  check_blas(library.desc_create(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor");
  check_blas(
      library.desc_set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)),
      "transpose");
  check_blas(library.layout_create(&plan.a, CUDA_R_16BF, in_features, out_features, in_features),
             "layout of W");
  check_blas(library.layout_create(&plan.b, CUDA_R_16BF, in_features, tokens, in_features),
             "layout of x");
  check_blas(library.layout_create(&plan.c, out_type, out_features, tokens, out_features),
             "layout of out");
  cublasLtMatrixLayout_t rounded_b = nullptr, rounded_c = nullptr;
  const int rounded = ceil_div(tokens, kTokenStep) * kTokenStep;
  check_blas(library.layout_create(&rounded_b, CUDA_R_16BF, in_features, rounded, in_features),
             "layout of x");
  check_blas(library.layout_create(&rounded_c, out_type, out_features, rounded, out_features),
             "layout of out");
  plan.algorithm = choose_algorithm(handle, plan, rounded_b, rounded_c, workspace_bytes);
  library.layout_destroy(rounded_b);
  library.layout_destroy(rounded_c);
  return plan;
}

}  // namespace

void blas_open(const std::string& path) {
  const std::lock_guard<std::mutex> lock(guard);
  if (library.create != nullptr) return;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(std::string("cuBLASLt: ") + dlerror());
  Library found;
  resolve(handle, "cublasLtMatmul", found.matmul);
  resolve(handle, "cublasLtMatmulAlgoGetHeuristic", found.heuristic);
  resolve(handle, "cublasLtMatmulDescCreate", found.desc_create);
  resolve(handle, "cublasLtMatmulDescSetAttribute", found.desc_set);
  resolve(handle, "cublasLtMatrixLayoutCreate", found.layout_create);
  resolve(handle, "cublasLtMatrixLayoutDestroy", found.layout_destroy);
  resolve(handle, "cublasLtMatmulPreferenceCreate", found.preference_create);
  resolve(handle, "cublasLtMatmulPreferenceDestroy", found.preference_destroy);
  resolve(handle, "cublasLtMatmulPreferenceSetAttribute", found.preference_set);
  resolve(handle, "cublasLtCreate", found.create);
  library = found;
}

void dense_linear(const bf16* x, const bf16* rows, void* out, bool out_is_float, int tokens,
                  int in_features, int out_features, void* workspace, int64_t workspace_bytes,
                  cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(guard);
  if (library.create == nullptr) throw std::runtime_error("linear: cuBLASLt is not open");
  int device = 0;
  check(cudaGetDevice(&device), "linear: device");
  cublasLtHandle_t handle = handle_of(device);
  const PlanKey key{device, tokens, in_features, out_features, out_is_float};
  auto found = plans.find(key);
  if (found == plans.end()) {
    found = plans
                .emplace(key, make_plan(handle, tokens, in_features, out_features, out_is_float,
                                        static_cast<size_t>(workspace_bytes)))
                .first;
  }
  const Plan& plan = found->second;
  const float one = 1.0f, zero = 0.0f;
  check_blas(library.matmul(handle, plan.operation, &one, rows, plan.a, x, plan.b, &zero, out,
                            plan.c, out, plan.c, &plan.algorithm, workspace,
                            static_cast<size_t>(workspace_bytes), stream),
             "matmul");
}

}  // namespace fd::cuda
