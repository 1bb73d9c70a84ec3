// Each segment's positions are sorted by index; a run of equal ones is one embedding row. Its sum is
// built in the run's first output row, whose squared norm is the run's part of the norm, and copied.
#include "index_sqnorm.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "machine.h"
#include "parallel.h"
#include "simd.h"

namespace fastreg {
namespace {

template <class T>
FASTREG_INLINE void add_to(const T* __restrict__ from, T* __restrict__ to, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// Positions [begin, end) of one embedding row; returns the squared norm of its gradient.
template <class T>
FASTREG_INLINE double share_run(const IndexSqnorm<T>& p, const std::int64_t* begin, const std::int64_t* end) {
  const std::size_t bytes = static_cast<std::size_t>(p.width) * sizeof(T);
  T* sum = p.shared + *begin * p.width;
  std::memcpy(sum, p.d + *begin * p.width, bytes);
  for (const std::int64_t* row = begin + 1; row != end; ++row) add_to(p.d + *row * p.width, sum, p.width);
  for (const std::int64_t* row = begin + 1; row != end; ++row) {
    std::memcpy(p.shared + *row * p.width, sum, bytes);
  }
  return dot(sum, sum, p.width);
}

FASTREG_CLONES double share_run_clone(const IndexSqnorm<float>& p, const std::int64_t* begin,
                                      const std::int64_t* end) {
  return share_run(p, begin, end);
}
FASTREG_CLONES double share_run_clone(const IndexSqnorm<double>& p, const std::int64_t* begin,
                                      const std::int64_t* end) {
  return share_run(p, begin, end);
}

template <class T>
double share_segment(const IndexSqnorm<T>& p, std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> order(end - begin);
  std::iota(order.begin(), order.end(), begin);
  // Equal indices stay in row order, so sums are repeatable.
  std::sort(order.begin(), order.end(), [&](std::int64_t left, std::int64_t right) {
    return p.index[left] != p.index[right] ? p.index[left] < p.index[right] : left < right;
  });
  double sq = 0;
  const std::int64_t* const last = order.data() + order.size();
  for (const std::int64_t *run = order.data(), *next; run != last; run = next) {
    next = std::find_if(run, last, [&](std::int64_t row) { return p.index[row] != p.index[*run]; });
    sq += share_run_clone(p, run, next);
  }
  return sq;
}

}  // namespace

template <class T>
void index_sqnorm(const IndexSqnorm<T>& p) {
  const int threads = threads_for(p.offsets[p.segments] * (p.width + 32), p.threads);
  parallel_for(p.segments, threads, [&](std::int64_t k) {
    p.sq[k] = static_cast<T>(share_segment(p, p.offsets[k], p.offsets[k + 1]));
  });
}

template void index_sqnorm(const IndexSqnorm<float>&);
template void index_sqnorm(const IndexSqnorm<double>&);

}  // namespace fastreg
