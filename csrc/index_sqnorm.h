// Embedding gradients per segment: squared norms, and the row each position shares.
#pragma once

#include <cstdint>

namespace fastreg {

template <class T>
struct IndexSqnorm {
  const std::int64_t* index;    // [rows]
  const T* d;                   // [rows, width]
  const std::int64_t* offsets;  // [segments + 1]
  T* sq;                        // [segments]
  T* shared;                    // [rows, width]
  std::int64_t width;
  std::int64_t segments;
  int threads;
};

// shared_s = sum of d_t over rows t of s's segment with index_t = index_s; sq[k] = sum of d_s.shared_s.
template <class T>
void index_sqnorm(const IndexSqnorm<T>& p);

}  // namespace fastreg
