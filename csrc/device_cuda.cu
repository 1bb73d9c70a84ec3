#include "device.h"

namespace fastreg {
namespace {

__global__ void code_arch_kernel(int* __restrict__ arch /* [1] */) {
#ifdef __CUDA_ARCH__
  *arch = __CUDA_ARCH__;
#endif
}

}  // namespace

cudaError_t device_count(int* count) { return cudaGetDeviceCount(count); }

cudaError_t launch_code_arch(int* arch, cudaStream_t stream) {
  code_arch_kernel<<<1, 1, 0, stream>>>(arch);
  return cudaGetLastError();
}

}  // namespace fastreg
