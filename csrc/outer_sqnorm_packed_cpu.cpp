// Segments of tens to hundreds of rows: the lower halves of both Gram matrices of a segment, which never leave the
// cache, and their inner product.
#include <algorithm>

#include "isa.h"
#include "outer_sqnorm.h"
#include "parallel.h"
#include "row_pairs.h"

namespace fastreg {
namespace {

// sum over t <= s of (a[s, t] + bias) d[s, t], s > t counted twice; rows are summed in double
template <class T>
FASTREG_INLINE double inner(const T* a, const T* d, std::int64_t stride, std::int64_t size, T bias) {
  double sum = 0;
  for (std::int64_t s = 0; s < size; ++s, a += stride, d += stride) {
    T below[8] = {};
    std::int64_t t = 0;
    for (; t + 8 <= s; t += 8) {
      for (int lane = 0; lane < 8; ++lane) below[lane] += (a[t + lane] + bias) * d[t + lane];
    }
    double row = 0;
    for (; t < s; ++t) row += static_cast<double>(a[t] + bias) * d[t];
    for (int lane = 0; lane < 8; ++lane) row += below[lane];
    sum += 2 * row + static_cast<double>(a[s] + bias) * d[s];
  }
  return sum;
}

struct Norms {
  template <class G, class T>
  static FASTREG_INLINE void run(const OuterSqnorm<T>& p, std::int64_t begin, std::int64_t end) {
    std::int64_t longest = 0;
    for (std::int64_t k = begin; k < end; ++k) longest = std::max(longest, p.offsets[k + 1] - p.offsets[k]);
    RowPairs<G, T> pairs(longest);
    const Buffer<T> a = pairs.products(longest), d = pairs.products(longest);
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t first = p.offsets[k], size = p.offsets[k + 1] - first;
      const T *own_a = p.a + first * p.inputs, *own_d = p.d + first * p.outputs;
      pairs.multiply(own_a, own_a, p.inputs, size, Band::kLower, a.get());
      pairs.multiply(own_d, own_d, p.outputs, size, Band::kLower, d.get());
      p.sq[k] = static_cast<T>(inner(a.get(), d.get(), pairs.stride, size, p.bias ? T(1) : T(0)));
    }
  }
};

}  // namespace

template <class T>
void outer_sqnorm_packed(const OuterSqnorm<T>& p) {
  const auto run = PerIsa<T, Norms, const OuterSqnorm<T>&, std::int64_t, std::int64_t>::best();
  // One chunk a thread: a chunk allocates its workspace, whose pages are costly the first time.
  const std::int64_t threads = std::max(1, p.threads);
  const std::int64_t grain = std::max<std::int64_t>(1, (p.segments + threads - 1) / threads);
  parallel_chunks(p.segments, grain, p.threads, [&](std::int64_t begin, std::int64_t end) { run(p, begin, end); });
}

template void outer_sqnorm_packed(const OuterSqnorm<float>&);
template void outer_sqnorm_packed(const OuterSqnorm<double>&);

}  // namespace fastreg
