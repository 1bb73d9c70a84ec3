// Segment gradients of a channelwise scale and bias, and their squared norms.
#pragma once

#include <cstdint>

namespace fastreg {

template <class T>
struct AffineSqnorm {
  const T* x;                   // [rows, channels, places]
  const T* d;                   // [rows, channels, places]
  const std::int64_t* offsets;  // [segments + 1]
  T* sq_scale;                  // [segments]
  T* sq_bias;                   // [segments]
  T* scale;                     // [segments, channels]
  T* bias;                      // [segments, channels]
  std::int64_t channels;
  std::int64_t places;
  std::int64_t segments;
  int threads;
};

// scale[k, c] = sum over rows s of k and places of d x; bias[k, c] = that sum of d.
template <class T>
void affine_sqnorm(const AffineSqnorm<T>& p);

}  // namespace fastreg
