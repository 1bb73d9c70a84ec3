// Backward and double backward of softmax attention, one head of one sample at a time. The softmax is recomputed from
// its log-sum-exp; nothing of the size of the scores outlives a head.
#pragma once

#include <cstdint>

namespace fastreg {

// One head of an operand: [length, width], rows `stride` apart.
template <class T>
struct Rows {
  const T* data;
  std::int64_t stride;
};

// An operand [samples, heads, length, width] in any layout whose rows are contiguous.
template <class T>
struct Operand {
  const T* data;
  std::int64_t sample_stride, head_stride, row_stride;
  std::int64_t heads;

  Rows<T> operator[](std::int64_t i) const {
    return {data + i / heads * sample_stride + i % heads * head_stride, row_stride};
  }
};

// Results are [samples, heads, length, width] and lse is [samples, heads, length], contiguous.
template <class T>
struct AttentionBackward {
  Operand<T> q, k, v, d;  // d: gradient of the output
  const T* lse;
  T *dq, *dk, *dv;
  std::int64_t samples, length, width;
  T scale;
  bool causal;
  int threads;

  std::int64_t heads() const { return samples * q.heads; }
};

// Given vq, vk, vv, the gradients of dq, dk, dv: those of d, q, k, v.
template <class T>
struct AttentionDoubleBackward {
  Operand<T> q, k, v, d, vq, vk, vv;
  const T* lse;
  T *grad_d, *grad_q, *grad_k, *grad_v;
  std::int64_t samples, length, width;
  T scale;
  bool causal;
  int threads;

  std::int64_t heads() const { return samples * q.heads; }
};

template <class T>
void attention_backward(const AttentionBackward<T>& p);
template <class T>
void attention_double_backward(const AttentionDoubleBackward<T>& p);

}  // namespace fastreg
