// One read of x and d. Work is cut into (segment, block of channels): the block's sums stay in the first
// level cache while the segment's rows pass by.
#include "affine_sqnorm.h"

#include <algorithm>

#include "machine.h"
#include "parallel.h"
#include "simd.h"

namespace fastreg {
namespace {

constexpr std::int64_t kBlockNumbers = 512;

template <class T>
struct Block {
  const AffineSqnorm<T>& p;
  std::int64_t segment;
  std::int64_t begin;  // channels
  std::int64_t end;
};

// One place per channel (layer norm): channels are adjacent, so they are the vector.
template <class T>
FASTREG_INLINE void add_row(const T* __restrict__ x, const T* __restrict__ d, std::int64_t channels,
                            T* __restrict__ scale, T* __restrict__ bias) {
#pragma omp simd
  for (std::int64_t c = 0; c < channels; ++c) {
    scale[c] += d[c] * x[c];
    bias[c] += d[c];
  }
}

// Many places per channel (images): places are the vector.
template <class T>
FASTREG_INLINE void add_channel(const T* __restrict__ x, const T* __restrict__ d, std::int64_t places,
                                T& scale, T& bias) {
  T product = 0, sum = 0;
#pragma omp simd reduction(+ : product, sum)
  for (std::int64_t i = 0; i < places; ++i) {
    product += d[i] * x[i];
    sum += d[i];
  }
  scale += product;
  bias += sum;
}

template <class T>
FASTREG_INLINE void sum_block(const Block<T>& block) {
  const AffineSqnorm<T>& p = block.p;
  T* scale = p.scale + block.segment * p.channels;
  T* bias = p.bias + block.segment * p.channels;
  std::fill(scale + block.begin, scale + block.end, T(0));
  std::fill(bias + block.begin, bias + block.end, T(0));
  for (std::int64_t s = p.offsets[block.segment]; s < p.offsets[block.segment + 1]; ++s) {
    const T* x = p.x + s * p.channels * p.places;
    const T* d = p.d + s * p.channels * p.places;
    if (p.places == 1) {
      add_row(x + block.begin, d + block.begin, block.end - block.begin, scale + block.begin,
              bias + block.begin);
      continue;
    }
    for (std::int64_t c = block.begin; c < block.end; ++c) {
      add_channel(x + c * p.places, d + c * p.places, p.places, scale[c], bias[c]);
    }
  }
}

FASTREG_CLONES void sum_block_clone(const Block<float>& block) { sum_block(block); }
FASTREG_CLONES void sum_block_clone(const Block<double>& block) { sum_block(block); }

template <class T>
T squared_norm(const T* row, std::int64_t n) {
  double sum = 0;
  for (std::int64_t c = 0; c < n; ++c) sum += static_cast<double>(row[c]) * row[c];
  return static_cast<T>(sum);
}

}  // namespace

template <class T>
void affine_sqnorm(const AffineSqnorm<T>& p) {
  const std::int64_t width =
      std::max<std::int64_t>(1, kBlockNumbers / std::max<std::int64_t>(1, p.places));
  const std::int64_t blocks = (p.channels + width - 1) / width;
  const int threads = threads_for(p.offsets[p.segments] * p.channels * p.places, p.threads);
  parallel_for(p.segments * blocks, threads, [&](std::int64_t i) {
    const std::int64_t begin = i % blocks * width;
    sum_block_clone(Block<T>{p, i / blocks, begin, std::min(p.channels, begin + width)});
  });
  for (std::int64_t k = 0; k < p.segments; ++k) {
    p.sq_scale[k] = squared_norm(p.scale + k * p.channels, p.channels);
    p.sq_bias[k] = squared_norm(p.bias + k * p.channels, p.channels);
  }
}

template void affine_sqnorm(const AffineSqnorm<float>&);
template void affine_sqnorm(const AffineSqnorm<double>&);

}  // namespace fastreg
