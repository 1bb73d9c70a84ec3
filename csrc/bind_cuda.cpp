// Python bindings of the CUDA code: module fastreg._cuda.
// Pointers and streams arrive as integers (Tensor.data_ptr(), Stream.cuda_stream); shapes, dtypes
// and devices are checked in Python before the call.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

namespace py = pybind11;

namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(static_cast<int>(status)) +
                           " (" + cudaGetErrorString(status) + ")");
}

int device_count() {
  int count = 0;
  check(fastreg::device_count(&count), "device_count");
  return count;
}

void code_arch(std::uintptr_t arch, std::uintptr_t stream) {
  check(fastreg::launch_code_arch(reinterpret_cast<int*>(arch), reinterpret_cast<cudaStream_t>(stream)),
        "code_arch");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastreg CUDA kernels";
  m.def("version", [] { return FASTREG_VERSION; }, "Version of fastreg this module was built from.");
  m.def("runtime_version", [] { return CUDART_VERSION; }, "CUDA runtime linked in, as 13000 for 13.0.");
  m.def("device_count", &device_count, "Devices the CUDA driver offers.");
  m.def("code_arch", &code_arch, py::arg("arch"), py::arg("stream"),
        "Write the architecture of the loaded code image into the int32 at device address `arch`.");
}
