// Python bindings of the CUDA code: module fastreg._cuda.
// Pointers and streams arrive as integers (Tensor.data_ptr(), Stream.cuda_stream); shapes, dtypes
// and devices are checked in Python before the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"
#include "multi_tensor_cuda.h"

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

// The constants of a rule are its fields, in order. All addresses are on the device, the stream's.
template <template <class> class Rule, class... Constants>
void bind_rule(py::module_& m, const char* name) {
  using fastreg::Chunk;
  m.def(name, [name](const std::array<std::uintptr_t, 3>& tables, std::int64_t tensors, std::int64_t count,
                     std::uintptr_t coefficients, std::uintptr_t partial, std::uintptr_t sums, std::uintptr_t stream,
                     Constants... constants) {
    const fastreg::TensorLists lists = {reinterpret_cast<const std::int64_t*>(tables[0]),
                                        reinterpret_cast<const Chunk*>(tables[1]),
                                        reinterpret_cast<const std::int64_t*>(tables[2]), tensors, count};
    check(fastreg::multi_tensor(Rule<float>{static_cast<float>(constants)...}, lists,
                                reinterpret_cast<const float*>(coefficients), reinterpret_cast<float*>(partial),
                                reinterpret_cast<float*>(sums), reinterpret_cast<cudaStream_t>(stream)),
          name);
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastreg CUDA kernels";
  m.def("version", [] { return FASTREG_VERSION; }, "Version of fastreg this module was built from.");
  m.def("runtime_version", [] { return CUDART_VERSION; }, "CUDA runtime linked in, as 13000 for 13.0.");
  m.def("device_count", &device_count, "Devices the CUDA driver offers.");
  m.def("code_arch", &code_arch, py::arg("arch"), py::arg("stream"),
        "Write the architecture of the loaded code image into the int32 at device address `arch`.");
  using D = double;
  bind_rule<fastreg::SqNorm>(m, "multi_sqnorm");
  bind_rule<fastreg::Dot>(m, "multi_dot");
  bind_rule<fastreg::Axpy>(m, "multi_axpy");
  bind_rule<fastreg::Sgd, D, D, D>(m, "multi_sgd");
  bind_rule<fastreg::SgdMomentum, D, D, D, D, D, D, D>(m, "multi_sgd_momentum");
  bind_rule<fastreg::AdamW, D, D, D, D, D, D, D>(m, "multi_adamw");
}
