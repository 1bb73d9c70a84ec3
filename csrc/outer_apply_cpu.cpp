// A segment's [s, s] weights stay in a small buffer between the two products, so short segments cost no
// batched matrix call each and no memory traffic beyond reading q, k, v and writing out.
#include "outer_apply.h"

#include <algorithm>
#include <vector>

#include "machine.h"
#include "parallel.h"
#include "simd.h"

namespace fastreg {
namespace {

constexpr int kTile = 4;
// Longest segment whose products are cheaper without packing.
constexpr std::int64_t kShort = 16;

// weights[s, t] = q_s.k_t + bias of one segment; rows beyond the last repeat it and are not stored.
template <class T>
FASTREG_INLINE void fill_weights(const OuterApply<T>& p, std::int64_t begin, std::int64_t size, T* weights) {
  for (std::int64_t s = 0; s < size; s += kTile) {
    for (std::int64_t t = 0; t < size; t += kTile) {
      const T* left[kTile];
      const T* right[kTile];
      T products[kTile][kTile];
      for (int r = 0; r < kTile; ++r) {
        left[r] = p.q + (begin + std::min(s + r, size - 1)) * p.inputs;
        right[r] = p.k + (begin + std::min(t + r, size - 1)) * p.inputs;
      }
      dots<kTile, kTile>(left, right, p.inputs, products);
      for (std::int64_t l = 0; l < std::min<std::int64_t>(kTile, size - s); ++l) {
        for (std::int64_t r = 0; r < std::min<std::int64_t>(kTile, size - t); ++r) {
          weights[(s + l) * size + t + r] = products[l][r] + static_cast<T>(p.bias);
        }
      }
    }
  }
}

// Rows [s, s + R) of out = weights v, a vector of outputs at a time.
template <int R, class T>
FASTREG_INLINE void weigh_rows(const T* weights, const T* v, std::int64_t size, std::int64_t outputs,
                               T* out) {
  using V = typename Simd<T>::V;
  constexpr int LANES = Simd<T>::LANES;
  std::int64_t o = 0;
  for (; o + LANES <= outputs; o += LANES) {
    V sum[R] = {};
    for (std::int64_t t = 0; t < size; ++t) {
      const V value = *reinterpret_cast<const V*>(v + t * outputs + o);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] += value * weights[r * size + t];
    }
    for (int r = 0; r < R; ++r) *reinterpret_cast<V*>(out + r * outputs + o) = sum[r];
  }
  for (; o < outputs; ++o) {
    for (int r = 0; r < R; ++r) {
      T sum = 0;
      for (std::int64_t t = 0; t < size; ++t) sum += v[t * outputs + o] * weights[r * size + t];
      out[r * outputs + o] = sum;
    }
  }
}

template <class T>
FASTREG_INLINE void apply_segment(const OuterApply<T>& p, std::int64_t begin, std::int64_t size, T* weights) {
  const T* v = p.v + begin * p.outputs;
  T* out = p.out + begin * p.outputs;
  if (size == 1) {
    weights[0] = dot(p.q + begin * p.inputs, p.k + begin * p.inputs, p.inputs) + static_cast<T>(p.bias);
  } else {
    fill_weights(p, begin, size, weights);
  }
  std::int64_t s = 0;
  for (; s + kTile <= size; s += kTile) {
    weigh_rows<kTile>(weights + s * size, v, size, p.outputs, out + s * p.outputs);
  }
  for (; s < size; ++s) weigh_rows<1>(weights + s * size, v, size, p.outputs, out + s * p.outputs);
}

template <class T>
struct Range {
  std::int64_t begin;
  std::int64_t end;
  T* weights;  // [longest segment, longest segment]
};

template <class T>
FASTREG_INLINE void apply_range(const OuterApply<T>& p, const Range<T>& range) {
  for (std::int64_t k = range.begin; k < range.end; ++k) {
    apply_segment(p, p.offsets[k], p.offsets[k + 1] - p.offsets[k], range.weights);
  }
}

FASTREG_CLONES void apply_range_clone(const OuterApply<float>& p, const Range<float>& range) {
  apply_range(p, range);
}
FASTREG_CLONES void apply_range_clone(const OuterApply<double>& p, const Range<double>& range) {
  apply_range(p, range);
}

}  // namespace

template <class T>
void outer_apply(const OuterApply<T>& p) {
  const std::int64_t rows = p.offsets[p.segments];
  const std::int64_t mean_rows = std::max<std::int64_t>(1, rows / p.segments);
  const std::int64_t segment_work = mean_rows * mean_rows * (p.inputs + p.outputs) + 1;
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 14) / segment_work);
  std::int64_t longest = 1;
  for (std::int64_t k = 0; k < p.segments; ++k) {
    longest = std::max(longest, p.offsets[k + 1] - p.offsets[k]);
  }
  if (longest > kShort) return outer_apply_packed(p);
  parallel_chunks(p.segments, grain, threads_for(segment_work * p.segments, p.threads),
                  [&](std::int64_t begin, std::int64_t end) {
                    std::vector<T> weights(longest * longest);
                    apply_range_clone(p, Range<T>{begin, end, weights.data()});
                  });
}

template void outer_apply(const OuterApply<float>&);
template void outer_apply(const OuterApply<double>&);

}  // namespace fastreg
