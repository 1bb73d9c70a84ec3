// Segments of tens to hundreds of rows: both products run on packed operands, one segment at a time, so that its
// [s, s] weights never leave the cache. With k = q the weights are symmetric and half of them are computed.
#include "outer_apply.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "row_pairs.h"

namespace fastreg {
namespace {

template <class G, class T>
struct Segment {
  const OuterApply<T>& p;
  bool symmetric;
  RowPairs<G, T> pairs;
  std::int64_t stride;
  Buffer<T> weights;

  Segment(const OuterApply<T>& p, std::int64_t longest)
      : p(p), symmetric(p.q == p.k), pairs(longest), stride(pairs.stride), weights(pairs.products(longest)) {}

  // weights = q k^T + bias; the upper half mirrors the lower one if they are symmetric
  FASTREG_INLINE void fill_weights(std::int64_t begin, std::int64_t size) {
    const std::int64_t at = begin * p.inputs;
    pairs.multiply(p.q + at, p.k + at, p.inputs, size, symmetric ? Band::kLower : Band::kFull, weights.get());
    const T bias = p.bias ? T(1) : T(0);
    for (std::int64_t s = 0; s < size; ++s) {
      const std::int64_t known = symmetric ? s + 1 : size;
      for (std::int64_t t = 0; t < known; ++t) weights[s * stride + t] += bias;
      if (!symmetric) continue;
      for (std::int64_t t = 0; t < s; ++t) weights[t * stride + s] = weights[s * stride + t];
    }
  }

  FASTREG_INLINE void run(std::int64_t begin, std::int64_t size) {
    fill_weights(begin, size);
    if (symmetric) {
      G::template pack_rows<G::TALL>(weights.get(), stride, size, size, pairs.left.get());
    } else {
      G::template pack_columns<G::TALL>(weights.get(), stride, size, size, pairs.left.get());
    }
    for (std::int64_t o = 0; o < p.outputs; o += kColumns) {
      const std::int64_t columns = std::min(kColumns, p.outputs - o);
      const std::int64_t at = begin * p.outputs + o;
      G::template pack_rows<G::WIDTH>(p.v + at, p.outputs, columns, size, pairs.right.get());
      G::multiply({pairs.left.get(), pairs.right.get(), size, columns, size, p.out + at, p.outputs, T(1), false, Band::kFull});
    }
  }
};

struct Segments {
  template <class G, class T>
  static FASTREG_INLINE void run(const OuterApply<T>& p, std::int64_t begin, std::int64_t end) {
    std::int64_t longest = 0;
    for (std::int64_t k = begin; k < end; ++k) longest = std::max(longest, p.offsets[k + 1] - p.offsets[k]);
    if (longest == 0) return;
    Segment<G, T> segment(p, longest);
    for (std::int64_t k = begin; k < end; ++k) segment.run(p.offsets[k], p.offsets[k + 1] - p.offsets[k]);
  }
};

}  // namespace

template <class T>
void outer_apply_packed(const OuterApply<T>& p) {
  const auto run = PerIsa<T, Segments, const OuterApply<T>&, std::int64_t, std::int64_t>::best();
  // One chunk a thread: a chunk allocates its workspace, whose pages are costly the first time.
  const std::int64_t threads = std::max(1, p.threads);
  const std::int64_t grain = std::max<std::int64_t>(1, (p.segments + threads - 1) / threads);
  parallel_chunks(p.segments, grain, p.threads, [&](std::int64_t begin, std::int64_t end) { run(p, begin, end); });
}

template void outer_apply_packed(const OuterApply<float>&);
template void outer_apply_packed(const OuterApply<double>&);

}  // namespace fastreg
