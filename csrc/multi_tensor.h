// Passes over whole lists of tensors: what is computed per element, for the CPU and the GPU alike.
//
// A rule takes one element of every list, in order, and overwrites those of the first kWritten lists; what it returns
// is added up per tensor. Lists are given as addresses [lists, tensors] and cut into chunks.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTREG_HD __host__ __device__ __forceinline__
#else
#include "simd.h"
#define FASTREG_HD FASTREG_INLINE
#endif

namespace fastreg {

// A run of elements of one tensor.
struct Chunk {
  std::int64_t tensor;
  std::int64_t start;
  std::int64_t size;
};

struct TensorLists {
  const std::int64_t* addresses;  // [lists, tensors]
  const Chunk* chunks;            // [count], those of a tensor follow one another
  const std::int64_t* bounds;     // [tensors + 1], the chunks of every tensor
  std::int64_t tensors;
  std::int64_t count;
};

template <class T>
struct SqNorm {
  static constexpr int kLists = 1, kWritten = 0;
  FASTREG_HD T operator()(T (&x)[1], T) const { return x[0] * x[0]; }
};

template <class T>
struct Dot {
  static constexpr int kLists = 2, kWritten = 0;
  FASTREG_HD T operator()(T (&x)[2], T) const { return x[0] * x[1]; }
};

// p += c d
template <class T>
struct Axpy {
  static constexpr int kLists = 2, kWritten = 1;
  FASTREG_HD T operator()(T (&x)[2], T coefficient) const {
    x[0] += coefficient * x[1];
    return 0;
  }
};

// torch.optim.SGD without momentum: lists p, g.
template <class T>
struct Sgd {
  static constexpr int kLists = 2, kWritten = 1;
  T lr, weight_decay, sign;
  FASTREG_HD T operator()(T (&x)[2], T) const {
    x[0] -= lr * (sign * x[1] + weight_decay * x[0]);
    return x[1] * x[1];
  }
};

// torch.optim.SGD with momentum: lists p, m, g. In the first step m becomes the gradient: keep = 0, fresh = 1.
template <class T>
struct SgdMomentum {
  static constexpr int kLists = 3, kWritten = 2;
  T lr, weight_decay, sign, keep, fresh, of_gradient, of_buffer;
  FASTREG_HD T operator()(T (&x)[3], T) const {
    const T d = sign * x[2] + weight_decay * x[0];
    x[1] = keep * x[1] + fresh * d;
    x[0] -= lr * (of_gradient * d + of_buffer * x[1]);
    return x[2] * x[2];
  }
};

// torch.optim.AdamW: lists p, m, v, g; `rate` and `root` hold the step's bias corrections.
template <class T>
struct AdamW {
  static constexpr int kLists = 4, kWritten = 3;
  T rate, decay, sign, beta1, beta2, root, eps;
  FASTREG_HD T operator()(T (&x)[4], T) const {
    const T g = sign * x[3];
    x[1] += (1 - beta1) * (g - x[1]);
    x[2] = beta2 * x[2] + (1 - beta2) * g * g;
    x[0] = decay * x[0] - rate * x[1] / (std::sqrt(x[2]) / root + eps);
    return g * g;
  }
};

}  // namespace fastreg
