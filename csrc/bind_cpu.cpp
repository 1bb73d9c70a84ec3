// Python bindings of the CPU code: module fastreg._C.
// Tensors arrive as integers from Tensor.data_ptr(); shapes, dtypes and contiguity are checked in
// Python before the call, and nothing here allocates or frees what it is given.
#include <pybind11/pybind11.h>

#include "machine.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastreg CPU kernels";
  m.def("version", [] { return FASTREG_VERSION; }, "Version of fastreg this module was built from.");
  m.def("max_threads", &fastreg::max_threads, "Threads an OpenMP region would use now.");
  m.def("isa", &fastreg::isa, "Instruction set the loader picked for cloned functions.");
}
