// Weight gradient of a linear layer and the squared norm of every segment's share of it.
#pragma once

#include <cstdint>

namespace fastreg {

template <class T>
struct OuterSum {
  const T* a;                   // [rows, inputs]
  const T* d;                   // [rows, outputs]
  const std::int64_t* offsets;  // [segments + 1], ascending from 0 to rows
  T* total;                     // [outputs, inputs]; null: norms only
  T* sq;                        // [segments]
  std::int64_t inputs;
  std::int64_t outputs;
  std::int64_t segments;
  int threads;
};

// total = sum_s d_s a_s^T;  sq[k] = || sum_{s in k} d_s a_s^T ||_F^2.
// Reductions run in an order that does not depend on the number of threads.
template <class T>
void outer_sum(const OuterSum<T>& p);

}  // namespace fastreg
