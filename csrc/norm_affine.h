// Layer, group and RMS norm with their scale and bias, to second order.
#pragma once

#include <cstdint>

namespace fastreg {

// Tensors [samples, groups, channels, places]; the numbers of one group of one sample are normalised together.
// A layer norm has one group and one place, an instance norm one channel per group.
struct NormShape {
  std::int64_t samples;
  std::int64_t groups;
  std::int64_t channels;
  std::int64_t places;

  std::int64_t width() const { return channels * places; }
  std::int64_t parameters() const { return groups * channels; }
  std::int64_t numbers() const { return samples * groups * channels * places; }
};

template <class T>
struct NormAffine {
  const T* x;       // [shape]
  const T* weight;  // [groups, channels]
  const T* bias;    // [groups, channels], or null
  T* y;             // [shape]
  T* mean;          // [samples, groups]
  T* rstd;          // [samples, groups]
  NormShape shape;
  double eps;
  bool center;
  int threads;
};

template <class T>
struct NormAffineBackward {
  const T* x;                   // [shape]
  const T* mean;                // [samples, groups]
  const T* rstd;                // [samples, groups]
  const T* weight;              // [groups, channels]
  const T* d;                   // [shape]
  const std::int64_t* offsets;  // [segments + 1], in samples
  T* dx;                        // [shape]
  T* scale;                     // [segments, groups, channels]
  T* bias;                      // [segments, groups, channels]
  NormShape shape;
  std::int64_t segments;
  bool center;
  int threads;
};

template <class T>
struct NormAffineDoubleBackward {
  const T* x;                   // [shape]
  const T* mean;                // [samples, groups]
  const T* rstd;                // [samples, groups]
  const T* weight;              // [groups, channels]
  const T* d;                   // [shape]
  const T* v;                   // [shape]
  const T* v_scale;             // [segments, groups, channels]
  const T* v_bias;              // [segments, groups, channels]
  const std::int64_t* offsets;  // [segments + 1], in samples
  T* grad_d;                    // [shape]
  T* grad_x;                    // [shape]
  T* grad_weight;               // [groups, channels]
  NormShape shape;
  std::int64_t segments;
  bool center;
  int threads;
};

// y = weight xhat + bias, xhat = (x - c mean(x)) rstd, rstd = (mean((x - c mean(x))^2) + eps)^(-1/2).
template <class T>
void norm_affine(const NormAffine<T>& p);

// With J g = rstd (g - c mean(g) - xhat mean(g xhat)) over the numbers normalised together:
// dx = J (weight d), scale_k = sum over the samples of k and places of d xhat, bias_k = that sum of d.
template <class T>
void norm_affine_backward(const NormAffineBackward<T>& p);

// Gradients of L = <v, dx> + sum_k <v_scale_k, scale_k> + <v_bias_k, bias_k> with respect to d, x and weight.
// With g = weight d, alpha = mean(g xhat), beta = mean(v xhat), kappa = mean(v g) - c mean(v) mean(g) - alpha beta:
// grad_d = weight J v + v_scale_k xhat + v_bias_k,
// grad_x = -rstd^2 (beta (g - c mean(g)) + alpha (v - c mean(v)) + xhat (kappa - 2 alpha beta)) + J (v_scale_k d),
// grad_weight = sum over samples and places of d J v.
template <class T>
void norm_affine_double_backward(const NormAffineDoubleBackward<T>& p);

}  // namespace fastreg
