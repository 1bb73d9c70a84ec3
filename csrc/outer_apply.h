// Each row through its own segment's outer-product sum.
#pragma once

#include <cstdint>

namespace fastreg {

template <class T>
struct OuterApply {
  const T* q;                   // [rows, inputs]
  const T* k;                   // [rows, inputs]
  const T* v;                   // [rows, outputs]
  const std::int64_t* offsets;  // [segments + 1]
  T* out;                       // [rows, outputs]
  std::int64_t inputs;
  std::int64_t outputs;
  std::int64_t segments;
  bool bias;
  int threads;
};

// out_s = sum over rows t of s's segment of (q_s.k_t + bias) v_t.
template <class T>
void outer_apply(const OuterApply<T>& p);

// The form for segments of tens of rows and more.
template <class T>
void outer_apply_packed(const OuterApply<T>& p);

}  // namespace fastreg
