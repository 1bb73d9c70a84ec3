// Passes over whole lists of tensors on the CPU.
#pragma once

#include "multi_tensor.h"

namespace fastreg {

// Runs the rule over all chunks; `coefficients` [tensors] and `sums` [tensors] may be null where the rule has none.
template <class Rule, class T>
void multi_tensor(const Rule& rule, const TensorLists& lists, const T* coefficients, T* sums, int threads);

}  // namespace fastreg
