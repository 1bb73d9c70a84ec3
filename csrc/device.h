// What the CUDA runtime and the loaded code see of the device. No Python, no torch.
// Every function that touches a device takes a stream, allocates nothing, never synchronises and
// returns the cudaError_t of what it did.
#pragma once

#include <cuda_runtime_api.h>

namespace fastreg {

// Number of CUDA devices the driver offers.
cudaError_t device_count(int* count);

// Writes the architecture of the code image that the driver picked for this device (900 for the
// sm_90a image, 800 for the sm_80 one or its PTX compiled for a newer device).
cudaError_t launch_code_arch(int* arch /* [1] on the device */, cudaStream_t stream);

}  // namespace fastreg
