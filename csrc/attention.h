// Softmax attention, its backward and its double backward. The softmax is recomputed from its log-sum-exp, some rows
// of it at a time: nothing of the size of the scores is kept.
#pragma once

#include <array>
#include <cstdint>

namespace fastreg {

// One head of an operand: [length, width], rows `stride` apart.
template <class T>
struct Rows {
  const T* data;
  std::int64_t stride;

  Rows from(std::int64_t row) const { return {data + row * stride, stride}; }
};

// An operand [samples, heads, length, width] in any layout whose rows are contiguous.
template <class T>
struct Operand {
  const T* data;
  std::int64_t sample_stride, head_stride, row_stride;

  Rows<T> at(std::int64_t sample, std::int64_t head) const {
    return {data + sample * sample_stride + head * head_stride, row_stride};
  }
};

// `shared` heads of keys divide the `heads` of queries.
struct AttentionShape {
  std::int64_t samples, heads, shared, queries, keys, width;

  std::int64_t group() const { return heads / shared; }
};

// Which keys a query sees, what is added to its scores, and what is dropped.
template <class T>
struct Pattern {
  const void* mask;  // bool (seen) or T (added), element (sample, head, query, key) at the strides; or null
  bool boolean;
  std::array<std::int64_t, 4> strides;
  const std::int32_t* spans;  // [2, queries], first key and end; or null
  std::uint64_t seed;
  std::uint32_t threshold;  // an entry is kept if its random word reaches it; 0 without dropout
  T factor;                 // of what is kept
  T scale;
  std::int64_t left, right;  // query - key <= left, key - query <= right; negative: no bound
};

// Results are contiguous: those of queries [samples, heads, queries, width], those of keys [samples, shared, keys,
// width], lse [samples, heads, queries]. Those of keys are added to: they must be zero before.
template <class T>
struct AttentionForward {
  Operand<T> q, k, v;
  T *out, *lse;
  AttentionShape shape;
  Pattern<T> pattern;
  int threads;
};

// d is the gradient of the output.
template <class T>
struct AttentionBackward {
  Operand<T> q, k, v, d;
  const T* lse;
  T *dq, *dk, *dv;
  AttentionShape shape;
  Pattern<T> pattern;
  int threads;
};

// Given vq, vk, vv, the gradients of dq, dk, dv: those of d, q, k, v.
template <class T>
struct AttentionDoubleBackward {
  Operand<T> q, k, v, d, vq, vk, vv;
  const T* lse;
  T *grad_d, *grad_q, *grad_k, *grad_v;
  AttentionShape shape;
  Pattern<T> pattern;
  int threads;
};

template <class T>
void attention_forward(const AttentionForward<T>& p);
template <class T>
void attention_backward(const AttentionBackward<T>& p);
template <class T>
void attention_double_backward(const AttentionDoubleBackward<T>& p);

}  // namespace fastreg
