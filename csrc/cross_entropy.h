// Softmax cross entropy of rows of logits to second order, and a label drawn from each row's softmax.
#pragma once

#include <cstdint>

namespace fastreg {

template <class T>
struct CrossEntropy {
  const T* z;                  // [rows, classes]
  const std::int64_t* labels;  // [rows], or null: the drawn ones
  const T* scale;              // [rows], or null with dz
  T* loss;                     // [rows]
  T* lse;                      // [rows]
  std::int64_t* drawn;         // [rows]
  T* dz;                       // [rows, classes], may be z; or null: it is not wanted
  std::int64_t rows;
  std::int64_t classes;
  std::uint64_t seed;
  std::uint64_t draw;
  int threads;
};

template <class T>
struct CrossEntropyBackward {
  const T* z;                  // [rows, classes]
  const T* lse;                // [rows]
  const std::int64_t* labels;  // [rows]
  const T* scale;              // [rows]
  T* dz;                       // [rows, classes]
  std::int64_t rows;
  std::int64_t classes;
  int threads;
};

template <class T>
struct CrossEntropyDoubleBackward {
  const T* z;                  // [rows, classes]
  const T* lse;                // [rows]
  const std::int64_t* labels;  // [rows]
  const T* scale;              // [rows]
  const T* v;                  // [rows, classes]
  T* grad_z;                   // [rows, classes]
  T* grad_scale;               // [rows]
  std::int64_t rows;
  std::int64_t classes;
  int threads;
};

// loss = lse - z_label, lse = log sum exp z, dz = scale (exp(z - lse) - onehot(label)). Rows of the label -100 have
// loss and gradient 0; a label that names no class gives NaN. The drawn label is the first class at which the
// cumulative probability exceeds a number that Philox-4x32-10 makes of (seed, draw, row).
template <class T>
void cross_entropy(const CrossEntropy<T>& p);

// dz as above.
template <class T>
void cross_entropy_backward(const CrossEntropyBackward<T>& p);

// With p = exp(z - lse): grad_z = scale p (v - <p, v>), grad_scale = <p, v> - v_label.
template <class T>
void cross_entropy_double_backward(const CrossEntropyDoubleBackward<T>& p);

}  // namespace fastreg
