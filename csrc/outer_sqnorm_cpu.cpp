// Pairs of rows, each unordered pair once: two rows against four at a time, so that a load serves several
// products. A segment of one row is the rank-one case |a|^2 |d|^2.
#include "outer_sqnorm.h"

#include <algorithm>

#include "machine.h"
#include "parallel.h"
#include "simd.h"

namespace fastreg {
namespace {

constexpr int kLeft = 2;
constexpr int kRight = 4;
// Longest segment whose products are cheaper without packing.
constexpr std::int64_t kShort = 16;

// Rows first, first + 1, ... clamped to the last row; a clamped row is computed and not counted.
template <int N, class T>
FASTREG_INLINE void rows_from(const T* base, std::int64_t first, std::int64_t last, std::int64_t width,
                              const T* (&rows)[N]) {
  for (int r = 0; r < N; ++r) rows[r] = base + std::min(first + r, last) * width;
}

// Sum over s in {first, first + 1} and t in [second, second + R), s <= t <= last; s < t counts twice.
template <int R, class T>
FASTREG_INLINE double pair_block(const OuterSqnorm<T>& p, std::int64_t first, std::int64_t second,
                                 std::int64_t last) {
  const T* left[kLeft];
  const T* right[R];
  T a[kLeft][R], d[kLeft][R];
  rows_from(p.a, first, last, p.inputs, left);
  rows_from(p.a, second, last, p.inputs, right);
  dots<kLeft, R>(left, right, p.inputs, a);
  rows_from(p.d, first, last, p.outputs, left);
  rows_from(p.d, second, last, p.outputs, right);
  dots<kLeft, R>(left, right, p.outputs, d);
  double sum = 0;
  for (int l = 0; l < kLeft; ++l) {
    for (int r = 0; r < R; ++r) {
      const std::int64_t s = first + l, t = second + r;
      if (s > t || t > last) continue;
      sum += (s == t ? 1.0 : 2.0) * (static_cast<double>(a[l][r]) + p.bias) * d[l][r];
    }
  }
  return sum;
}

template <class T>
FASTREG_INLINE double segment_sum(const OuterSqnorm<T>& p, std::int64_t begin, std::int64_t end) {
  if (end - begin == 1) {
    const T* a = p.a + begin * p.inputs;
    const T* d = p.d + begin * p.outputs;
    return (static_cast<double>(dot(a, a, p.inputs)) + p.bias) * dot(d, d, p.outputs);
  }
  double sum = 0;
  for (std::int64_t first = begin; first < end; first += kLeft) {
    std::int64_t second = first;
    if (end - second == 2) {
      sum += pair_block<2>(p, first, second, end - 1);
      continue;
    }
    for (; second < end; second += kRight) sum += pair_block<kRight>(p, first, second, end - 1);
  }
  return sum;
}

template <class T>
FASTREG_INLINE void segment_range(const OuterSqnorm<T>& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t k = begin; k < end; ++k) {
    p.sq[k] = static_cast<T>(segment_sum(p, p.offsets[k], p.offsets[k + 1]));
  }
}

FASTREG_CLONES void segment_range_clone(const OuterSqnorm<float>& p, std::int64_t begin, std::int64_t end) {
  segment_range(p, begin, end);
}
FASTREG_CLONES void segment_range_clone(const OuterSqnorm<double>& p, std::int64_t begin, std::int64_t end) {
  segment_range(p, begin, end);
}

}  // namespace

template <class T>
void outer_sqnorm(const OuterSqnorm<T>& p) {
  const std::int64_t rows = p.offsets[p.segments];
  std::int64_t longest = 0;
  for (std::int64_t k = 0; k < p.segments; ++k) longest = std::max(longest, p.offsets[k + 1] - p.offsets[k]);
  if (longest > kShort) return outer_sqnorm_packed(p);
  const std::int64_t mean_rows = std::max<std::int64_t>(1, rows / p.segments);
  const std::int64_t segment_work = mean_rows * mean_rows * (p.inputs + p.outputs) / 2 + 1;
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 14) / segment_work);
  parallel_chunks(p.segments, grain, threads_for(segment_work * p.segments, p.threads),
                  [&](std::int64_t begin, std::int64_t end) { segment_range_clone(p, begin, end); });
}

template void outer_sqnorm(const OuterSqnorm<float>&);
template void outer_sqnorm(const OuterSqnorm<double>&);

}  // namespace fastreg
