// Backward and double backward of softmax attention, one head of one sample at a time. The softmax is recomputed from
// its log-sum-exp; nothing of the size of the scores outlives a head.
#pragma once

#include <cstdint>

namespace fastreg {

// All matrices are [heads, length, width], contiguous; lse is [heads, length].
template <class T>
struct AttentionBackward {
  const T *q, *k, *v, *lse;
  const T* d;         // gradient of the output
  T *dq, *dk, *dv;
  std::int64_t heads, length, width;
  T scale;
  bool causal;
  int threads;
};

// Given vq, vk, vv, the gradients of dq, dk, dv: those of d, q, k, v.
template <class T>
struct AttentionDoubleBackward {
  const T *q, *k, *v, *lse, *d;
  const T *vq, *vk, *vv;
  T *grad_d, *grad_q, *grad_k, *grad_v;
  std::int64_t heads, length, width;
  T scale;
  bool causal;
  int threads;
};

template <class T>
void attention_backward(const AttentionBackward<T>& p);
template <class T>
void attention_double_backward(const AttentionDoubleBackward<T>& p);

}  // namespace fastreg
