// Inner products over segments of rows.
#pragma once

#include <cstdint>

namespace fastreg {

template <class T>
struct SegmentDot {
  const T* x;                   // [rows, width]
  const T* y;                   // [rows, width]
  const std::int64_t* offsets;  // [segments + 1]
  T* out;                       // [segments]
  std::int64_t width;
  std::int64_t segments;
  int threads;
};

// out[k] = sum over the rows s of segment k of x_s . y_s.
template <class T>
void segment_dot(const SegmentDot<T>& p);

}  // namespace fastreg
