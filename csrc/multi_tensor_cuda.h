// Passes over whole lists of tensors on a GPU: one launch for all of them, one more to add up chunks.
// Launchers allocate nothing, never synchronise and return the cudaError_t of what they did.
#pragma once

#include <cuda_runtime_api.h>

#include "multi_tensor.h"

namespace fastreg {

// Runs the rule over all chunks of float tensors. Everything is on the device: `coefficients` [tensors], `partial`
// [chunks] and `sums` [tensors] may be null where the rule has none.
template <class Rule>
cudaError_t multi_tensor(const Rule& rule, const TensorLists& lists, const float* coefficients, float* partial,
                         float* sums, cudaStream_t stream);

}  // namespace fastreg
