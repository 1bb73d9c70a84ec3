// Double backward of GELU in one elementwise pass, single precision.
#pragma once

#include <cstdint>

namespace fastreg {

struct GeluDoubleBackward {
  const float* x;  // [size]
  const float* d;  // [size]
  const float* v;  // [size]
  float* grad_d;   // [size], v gelu'(x)
  float* grad_x;   // [size], v d gelu''(x)
  std::int64_t size;
  bool approximate;  // the tanh form
  int threads;
};

void gelu_double_backward(const GeluDoubleBackward& p);

}  // namespace fastreg
