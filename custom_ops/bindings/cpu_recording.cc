// Steps that are repeated without Python.
#include "bindings.h"
#include "recording.h"

namespace fd {
namespace {

void begin(Recording& recording) {
  if (Recording::active()) throw std::runtime_error("this thread is recording already");
  Recording::active() = &recording;
}

void end() { Recording::active() = nullptr; }

}  // namespace

Recording*& Recording::active() {
  static thread_local Recording* active = nullptr;
  return active;
}

void bind_recording(py::module_& m) {
  py::class_<Recording>(m, "Recording",
                        "The ops that a thread computes while this is entered; a call repeats them "
                        "on the same addresses, which it does not keep alive.")
      .def(py::init<>())
      .def("__enter__", &begin)
      .def("__exit__", [](Recording&, const py::args&) { end(); })
      .def("__call__", &Recording::operator(), no_gil())
      .def("__len__", &Recording::size);
}

}  // namespace fd
