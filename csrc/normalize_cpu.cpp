// Each row is read from memory once: the second pass over it finds it in cache.
#include "normalize.h"

#include <cmath>

#include "machine.h"
#include "parallel.h"
#include "simd.h"

namespace fastreg {
namespace {

template <class T>
FASTREG_INLINE void forward_rows(const Normalize<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = p.width;
  for (std::int64_t row = begin; row < end; ++row) {
    const T* __restrict__ x = p.x + row * n;
    T* __restrict__ xhat = p.xhat + row * n;
    T sum = 0, squares = 0;
    if (p.center) {
#pragma omp simd reduction(+ : sum)
      for (std::int64_t i = 0; i < n; ++i) sum += x[i];
    }
    const T mean = sum / static_cast<T>(n);
    // Squares of the centred row, not mean(x^2) - mean(x)^2: that difference cancels.
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const T rstd = T(1) / std::sqrt(squares / static_cast<T>(n) + static_cast<T>(p.eps));
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) xhat[i] = (x[i] - mean) * rstd;
    p.rstd[row] = rstd;
  }
}

template <class T>
FASTREG_INLINE void backward_rows(const NormalizeBackward<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = p.width;
  for (std::int64_t row = begin; row < end; ++row) {
    const T* __restrict__ xhat = p.xhat + row * n;
    const T* __restrict__ g = p.g + row * n;
    T* __restrict__ dx = p.dx + row * n;
    T sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (std::int64_t i = 0; i < n; ++i) {
      sum += g[i];
      product += g[i] * xhat[i];
    }
    const T mean = p.center ? sum / static_cast<T>(n) : T(0);
    const T slope = product / static_cast<T>(n);
    const T rstd = p.rstd[row];
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) dx[i] = rstd * (g[i] - mean - xhat[i] * slope);
  }
}

template <class T>
FASTREG_INLINE void double_backward_rows(const NormalizeDoubleBackward<T>& p, std::int64_t begin,
                                         std::int64_t end) {
  const std::int64_t n = p.width;
  const T scale = T(1) / static_cast<T>(n);
  for (std::int64_t row = begin; row < end; ++row) {
    const T* __restrict__ xhat = p.xhat + row * n;
    const T* __restrict__ g = p.g + row * n;
    const T* __restrict__ v = p.v + row * n;
    T* __restrict__ grad_g = p.grad_g + row * n;
    T* __restrict__ grad_x = p.grad_x + row * n;
    T sum_g = 0, sum_v = 0, alpha = 0, beta = 0, kappa = 0;
#pragma omp simd reduction(+ : sum_g, sum_v, alpha, beta, kappa)
    for (std::int64_t i = 0; i < n; ++i) {
      sum_g += g[i];
      sum_v += v[i];
      alpha += g[i] * xhat[i];
      beta += v[i] * xhat[i];
      kappa += g[i] * v[i];
    }
    const T mean_g = p.center ? sum_g * scale : T(0), mean_v = p.center ? sum_v * scale : T(0);
    alpha *= scale;
    beta *= scale;
    kappa = kappa * scale - mean_g * mean_v - alpha * beta;
    const T rstd = p.rstd[row], square = -rstd * rstd, along = kappa - 2 * alpha * beta;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      const T centred_v = v[i] - mean_v;
      grad_g[i] = rstd * (centred_v - xhat[i] * beta);
      grad_x[i] = square * (beta * (g[i] - mean_g) + alpha * centred_v + xhat[i] * along);
    }
  }
}

// Overloads, not templates, carry the clones: a template's clones have no symbol of their own.
#define FASTREG_ROWS(NAME, PARAMS)                                                               \
  FASTREG_CLONES void NAME##_clone(const PARAMS<float>& p, std::int64_t begin, std::int64_t end) { \
    NAME(p, begin, end);                                                                         \
  }                                                                                              \
  FASTREG_CLONES void NAME##_clone(const PARAMS<double>& p, std::int64_t begin, std::int64_t end) { \
    NAME(p, begin, end);                                                                         \
  }
FASTREG_ROWS(forward_rows, Normalize)
FASTREG_ROWS(backward_rows, NormalizeBackward)
FASTREG_ROWS(double_backward_rows, NormalizeDoubleBackward)
#undef FASTREG_ROWS

// Rows per task: about 16K numbers, enough to outweigh handing a task to a thread.
std::int64_t grain_of(std::int64_t width) {
  constexpr std::int64_t numbers = 1 << 14;
  return std::max<std::int64_t>(1, numbers / std::max<std::int64_t>(1, width));
}

}  // namespace

template <class T>
void normalize(const Normalize<T>& p) {
  parallel_chunks(p.rows, grain_of(p.width), threads_for(p.rows * p.width, p.threads),
                  [&](std::int64_t begin, std::int64_t end) { forward_rows_clone(p, begin, end); });
}

template <class T>
void normalize_backward(const NormalizeBackward<T>& p) {
  parallel_chunks(p.rows, grain_of(p.width), threads_for(p.rows * p.width, p.threads),
                  [&](std::int64_t begin, std::int64_t end) { backward_rows_clone(p, begin, end); });
}

template <class T>
void normalize_double_backward(const NormalizeDoubleBackward<T>& p) {
  parallel_chunks(p.rows, grain_of(p.width), threads_for(p.rows * p.width, p.threads),
                  [&](std::int64_t begin, std::int64_t end) { double_backward_rows_clone(p, begin, end); });
}

#define FASTREG_INSTANTIATE(T)                                              \
  template void normalize(const Normalize<T>&);                             \
  template void normalize_backward(const NormalizeBackward<T>&);            \
  template void normalize_double_backward(const NormalizeDoubleBackward<T>&);
FASTREG_INSTANTIATE(float)
FASTREG_INSTANTIATE(double)
#undef FASTREG_INSTANTIATE

}  // namespace fastreg
