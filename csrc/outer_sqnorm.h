// Squared norms of per-segment weight gradients from pairs of rows.
#pragma once

#include <cstdint>

namespace fastreg {

template <class T>
struct OuterSqnorm {
  const T* a;                   // [rows, inputs]
  const T* d;                   // [rows, outputs]
  const std::int64_t* offsets;  // [segments + 1]
  T* sq;                        // [segments]
  std::int64_t inputs;
  std::int64_t outputs;
  std::int64_t segments;
  bool bias;
  int threads;
};

// sq[k] = sum over pairs s, t of rows of k of (a_s.a_t + bias) (d_s.d_t). Made for short segments.
template <class T>
void outer_sqnorm(const OuterSqnorm<T>& p);

// The same, made for tens to hundreds of rows per segment.
template <class T>
void outer_sqnorm_packed(const OuterSqnorm<T>& p);

}  // namespace fastreg
