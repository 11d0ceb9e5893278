// The module fastdeploy_lite._ops_cpu: one bind function per family of ops.
#include "bindings.h"

namespace fd {

void bind_system(py::module_& m);
void bind_linear(py::module_& m);
void bind_sampling(py::module_& m);
void bind_attention(py::module_& m);
void bind_rowwise(py::module_& m);
void bind_speculation(py::module_& m);
void bind_code_search(py::module_& m);
void bind_plans(py::module_& m);
void bind_kernel_plans(py::module_& m);
void bind_ranks(py::module_& m);
void bind_recording(py::module_& m);

}  // namespace fd

PYBIND11_MODULE(_ops_cpu, m) {
  m.doc() =
      "CPU kernels over views (pointer, dtype, shape, strides); outputs are written in place.";
  fd::bind_system(m);
  fd::bind_linear(m);
  fd::bind_sampling(m);
  fd::bind_attention(m);
  fd::bind_rowwise(m);
  fd::bind_speculation(m);
  fd::bind_code_search(m);
  fd::bind_plans(m);
  fd::bind_kernel_plans(m);
  fd::bind_ranks(m);
  fd::bind_recording(m);
}
