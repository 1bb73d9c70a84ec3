// One row (the numbers normalised together) of layer, group and RMS norm with scale and bias. "adjacent": one place
// per channel, so channels are the vector; "spread": places are, and row sums follow from sums over channels.
#pragma once

#include <cmath>
#include <cstdint>

#include "norm_affine.h"
#include "simd.h"

namespace fastreg {

template <class T>
struct Moments {
  T mean;
  T rstd;
};

template <class T>
struct BackwardRow {
  const T* x;       // [channels, places]
  const T* d;       // [channels, places]
  const T* weight;  // [channels]
  Moments<T> m;
};

template <class T>
struct DoubleRow {
  const T* x;        // [channels, places]
  const T* d;        // [channels, places]
  const T* v;        // [channels, places]
  const T* weight;   // [channels]
  const T* v_scale;  // [channels]
  const T* v_bias;   // [channels]
  Moments<T> m;
};

template <class T>
FASTREG_INLINE Moments<T> moments(const T* __restrict__ x, std::int64_t n, double eps, bool center) {
  T sum = 0, squares = 0;
  if (center) {
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < n; ++i) sum += x[i];
  }
  const T mean = sum / static_cast<T>(n);
  // Squares of the centred row, not mean(x^2) - mean(x)^2: that difference cancels.
#pragma omp simd reduction(+ : squares)
  for (std::int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, T(1) / std::sqrt(squares / static_cast<T>(n) + static_cast<T>(eps))};
}

// y = weight (x - mean) rstd + bias.
template <class T>
FASTREG_INLINE void scale_row(const T* __restrict__ x, const Moments<T>& m, const T* __restrict__ weight,
                              const T* __restrict__ bias, T* __restrict__ y, const NormShape& shape) {
  if (shape.places == 1 && bias != nullptr) {
#pragma omp simd
    for (std::int64_t c = 0; c < shape.channels; ++c) y[c] = (x[c] - m.mean) * m.rstd * weight[c] + bias[c];
    return;
  }
  if (shape.places == 1) {
#pragma omp simd
    for (std::int64_t c = 0; c < shape.channels; ++c) y[c] = (x[c] - m.mean) * m.rstd * weight[c];
    return;
  }
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const T scale = m.rstd * weight[c], shift = bias == nullptr ? T(0) : bias[c];
    const T* from = x + c * shape.places;
    T* to = y + c * shape.places;
#pragma omp simd
    for (std::int64_t i = 0; i < shape.places; ++i) to[i] = (from[i] - m.mean) * scale + shift;
  }
}

template <class T>
FASTREG_INLINE void backward_adjacent(const BackwardRow<T>& in, std::int64_t n, bool center, T* __restrict__ scale,
                                      T* __restrict__ bias, T* __restrict__ dx) {
  const T *__restrict__ x = in.x, *__restrict__ d = in.d, *__restrict__ w = in.weight;
  const T mean = in.m.mean, rstd = in.m.rstd, one_over_n = T(1) / static_cast<T>(n);
  T sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (std::int64_t i = 0; i < n; ++i) {
    const T hat = (x[i] - mean) * rstd, along = d[i] * hat;
    sum += w[i] * d[i];
    product += w[i] * along;
    scale[i] += along;
    bias[i] += d[i];
  }
  const T mean_g = center ? sum * one_over_n : T(0), slope = product * one_over_n;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) dx[i] = rstd * (w[i] * d[i] - mean_g - (x[i] - mean) * rstd * slope);
}

template <class T>
FASTREG_INLINE void backward_spread(const BackwardRow<T>& in, const NormShape& shape, bool center, T* scale, T* bias,
                                    T* dx) {
  const std::int64_t places = shape.places;
  const T mean = in.m.mean, rstd = in.m.rstd, one_over_n = T(1) / static_cast<T>(shape.width());
  T sum = 0, product = 0;
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const T *__restrict__ x = in.x + c * places, *__restrict__ d = in.d + c * places;
    T of_d = 0, along = 0;
#pragma omp simd reduction(+ : of_d, along)
    for (std::int64_t i = 0; i < places; ++i) {
      of_d += d[i];
      along += d[i] * (x[i] - mean);
    }
    along *= rstd;
    scale[c] += along;
    bias[c] += of_d;
    sum += in.weight[c] * of_d;
    product += in.weight[c] * along;
  }
  const T constant = center ? -rstd * sum * one_over_n : T(0), slope = -rstd * rstd * product * one_over_n;
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const T *__restrict__ x = in.x + c * places, *__restrict__ d = in.d + c * places;
    T* __restrict__ to = dx + c * places;
    const T factor = rstd * in.weight[c];
#pragma omp simd
    for (std::int64_t i = 0; i < places; ++i) to[i] = factor * d[i] + slope * (x[i] - mean) + constant;
  }
}

// Means over a row, with g = weight d and u = v_scale d; those of g, u and v are zero where the norm does not centre.
template <class T>
struct Means {
  T g = 0, u = 0, v = 0, g_hat = 0, u_hat = 0, v_hat = 0, g_v = 0;

  FASTREG_INLINE void divide(std::int64_t n, bool center) {
    const T one_over_n = T(1) / static_cast<T>(n), one_if_centred = center ? one_over_n : T(0);
    g *= one_if_centred;
    u *= one_if_centred;
    v *= one_if_centred;
    g_hat *= one_over_n;
    u_hat *= one_over_n;
    v_hat *= one_over_n;
    g_v *= one_over_n;
  }

  // The factor of -rstd^2 xhat in grad_x: kappa - 2 alpha beta.
  FASTREG_INLINE T along_hat() const { return g_v - v * g - 3 * g_hat * v_hat; }
};

template <class T>
FASTREG_INLINE Means<T> means_adjacent(const DoubleRow<T>& in, std::int64_t n, bool center) {
  const T *__restrict__ x = in.x, *__restrict__ d = in.d, *__restrict__ v = in.v;
  const T *__restrict__ w = in.weight, *__restrict__ q = in.v_scale;
  const T mean = in.m.mean, rstd = in.m.rstd;
  T g = 0, u = 0, of_v = 0, g_hat = 0, u_hat = 0, v_hat = 0, g_v = 0;
#pragma omp simd reduction(+ : g, u, of_v, g_hat, u_hat, v_hat, g_v)
  for (std::int64_t i = 0; i < n; ++i) {
    const T hat = (x[i] - mean) * rstd, wd = w[i] * d[i], qd = q[i] * d[i];
    g += wd;
    u += qd;
    of_v += v[i];
    g_hat += wd * hat;
    u_hat += qd * hat;
    v_hat += v[i] * hat;
    g_v += wd * v[i];
  }
  Means<T> means{g, u, of_v, g_hat, u_hat, v_hat, g_v};
  means.divide(n, center);
  return means;
}

template <class T>
FASTREG_INLINE void double_backward_adjacent(const DoubleRow<T>& in, std::int64_t n, bool center,
                                             T* __restrict__ grad_d, T* __restrict__ grad_x,
                                             T* __restrict__ grad_weight) {
  const Means<T> mean_of = means_adjacent(in, n, center);
  const T *__restrict__ x = in.x, *__restrict__ d = in.d, *__restrict__ v = in.v;
  const T *__restrict__ w = in.weight, *__restrict__ q = in.v_scale, *__restrict__ shift = in.v_bias;
  const T mean = in.m.mean, rstd = in.m.rstd, along = mean_of.along_hat();
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const T hat = (x[i] - mean) * rstd, centred_v = v[i] - mean_of.v;
    const T jv = rstd * (centred_v - hat * mean_of.v_hat);
    const T of_g = mean_of.v_hat * (w[i] * d[i] - mean_of.g) + mean_of.g_hat * centred_v + hat * along;
    grad_d[i] = w[i] * jv + hat * q[i] + shift[i];
    grad_x[i] = rstd * (q[i] * d[i] - mean_of.u - hat * mean_of.u_hat - rstd * of_g);
    grad_weight[i] += jv * d[i];
  }
}

// Also leaves the sums of d, d xhat and d v of each channel in `sums` [channels, 3].
template <class T>
FASTREG_INLINE Means<T> means_spread(const DoubleRow<T>& in, const NormShape& shape, bool center, T* sums) {
  const std::int64_t places = shape.places;
  const T mean = in.m.mean;
  Means<T> means;
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const T *__restrict__ x = in.x + c * places, *__restrict__ d = in.d + c * places;
    const T* __restrict__ v = in.v + c * places;
    T of_d = 0, of_v = 0, d_hat = 0, v_hat = 0, d_v = 0;
#pragma omp simd reduction(+ : of_d, of_v, d_hat, v_hat, d_v)
    for (std::int64_t i = 0; i < places; ++i) {
      of_d += d[i];
      of_v += v[i];
      d_hat += d[i] * (x[i] - mean);
      v_hat += v[i] * (x[i] - mean);
      d_v += d[i] * v[i];
    }
    d_hat *= in.m.rstd;
    means.g += in.weight[c] * of_d;
    means.u += in.v_scale[c] * of_d;
    means.v += of_v;
    means.g_hat += in.weight[c] * d_hat;
    means.u_hat += in.v_scale[c] * d_hat;
    means.v_hat += in.m.rstd * v_hat;
    means.g_v += in.weight[c] * d_v;
    sums[3 * c] = of_d;
    sums[3 * c + 1] = d_hat;
    sums[3 * c + 2] = d_v;
  }
  means.divide(shape.width(), center);
  return means;
}

template <class T>
FASTREG_INLINE void double_backward_spread(const DoubleRow<T>& in, const NormShape& shape, bool center, T* grad_d,
                                           T* grad_x, T* grad_weight, T* sums) {
  const Means<T> mean_of = means_spread(in, shape, center, sums);
  const std::int64_t places = shape.places;
  const T mean = in.m.mean, rstd = in.m.rstd, square = -rstd * rstd;
  // grad_x = x_d d + x_v v + x_x (x - mean) + x_1, and grad_d likewise: three coefficients per channel, two shared.
  const T x_v = square * mean_of.g_hat;
  const T x_x = rstd * (square * mean_of.along_hat() - rstd * mean_of.u_hat);
  const T x_1 = -square * (mean_of.v_hat * mean_of.g + mean_of.g_hat * mean_of.v) - rstd * mean_of.u;
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const T *__restrict__ x = in.x + c * places, *__restrict__ d = in.d + c * places;
    const T* __restrict__ v = in.v + c * places;
    T *__restrict__ to_d = grad_d + c * places, *__restrict__ to_x = grad_x + c * places;
    const T w = in.weight[c], q = in.v_scale[c], d_v = w * rstd;
    const T d_x = rstd * (q - d_v * mean_of.v_hat), d_1 = in.v_bias[c] - d_v * mean_of.v;
    const T x_d = square * mean_of.v_hat * w + rstd * q;
#pragma omp simd
    for (std::int64_t i = 0; i < places; ++i) {
      const T centred = x[i] - mean;
      to_d[i] = d_v * v[i] + d_x * centred + d_1;
      to_x[i] = x_d * d[i] + x_v * v[i] + x_x * centred + x_1;
    }
    grad_weight[c] += rstd * (sums[3 * c + 2] - mean_of.v * sums[3 * c] - mean_of.v_hat * sums[3 * c + 1]);
  }
}

}  // namespace fastreg
