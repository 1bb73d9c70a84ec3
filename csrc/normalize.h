// Row normalisation (layer, group and RMS norm without the affine part) to second order.
#pragma once

#include <cstdint>

namespace fastreg {

template <class T>
struct Normalize {
  const T* x;  // [rows, width]
  T* xhat;     // [rows, width]
  T* rstd;     // [rows]
  std::int64_t rows;
  std::int64_t width;
  double eps;
  bool center;
  int threads;
};

template <class T>
struct NormalizeBackward {
  const T* xhat;  // [rows, width]
  const T* rstd;  // [rows]
  const T* g;     // [rows, width]
  T* dx;          // [rows, width]
  std::int64_t rows;
  std::int64_t width;
  bool center;
  int threads;
};

template <class T>
struct NormalizeDoubleBackward {
  const T* xhat;  // [rows, width]
  const T* rstd;  // [rows]
  const T* g;     // [rows, width]
  const T* v;     // [rows, width]
  T* grad_g;      // [rows, width]
  T* grad_x;      // [rows, width]
  std::int64_t rows;
  std::int64_t width;
  bool center;
  int threads;
};

// xhat = (x - c mean(x)) rstd, rstd = (mean((x - c mean(x))^2) + eps)^(-1/2).
template <class T>
void normalize(const Normalize<T>& p);

// dx = rstd (g - c mean(g) - xhat mean(g xhat)).
template <class T>
void normalize_backward(const NormalizeBackward<T>& p);

// With alpha = mean(g xhat), beta = mean(v xhat), kappa = mean(v g) - c mean(v) mean(g) - alpha beta:
// grad_g = rstd (v - c mean(v) - xhat beta),
// grad_x = -rstd^2 (beta (g - c mean(g)) + alpha (v - c mean(v)) + xhat (kappa - 2 alpha beta)).
template <class T>
void normalize_double_backward(const NormalizeDoubleBackward<T>& p);

}  // namespace fastreg
