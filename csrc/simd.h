// Vectors of 64 bytes as the compiler's own type: one AVX-512 register, two of AVX2, four of SSE or
// NEON. Use inside functions marked FASTREG_CLONES.
#pragma once

#include <cstdint>

#define FASTREG_INLINE __attribute__((always_inline)) inline

namespace fastreg {

template <class T>
struct Simd {
  // Loads and stores through this type need no alignment.
  typedef T V __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
  static constexpr int LANES = 64 / sizeof(T);

  static FASTREG_INLINE T sum(const V& v) {
    T total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += v[lane];
    return total;
  }
};

// out[l][r] = left[l] . right[r], rows of n numbers. Several rows at once, because a product of two
// rows alone loads twice per multiplication and waits for every sum.
template <int L, int R, class T>
FASTREG_INLINE void dots(const T* const (&left)[L], const T* const (&right)[R], std::int64_t n,
                         T (&out)[L][R]) {
  using V = typename Simd<T>::V;
  constexpr int LANES = Simd<T>::LANES;
  V sum[L][R] = {};
  std::int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    V values[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) values[r] = *reinterpret_cast<const V*>(right[r] + i);
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
      const V value = *reinterpret_cast<const V*>(left[l] + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[l][r] += value * values[r];
    }
  }
  for (int l = 0; l < L; ++l) {
    for (int r = 0; r < R; ++r) {
      out[l][r] = Simd<T>::sum(sum[l][r]);
      for (std::int64_t j = i; j < n; ++j) out[l][r] += left[l][j] * right[r][j];
    }
  }
}

// Sum of x[i] y[i]; four accumulators hide the latency of the additions.
template <class T>
FASTREG_INLINE T dot(const T* x, const T* y, std::int64_t n) {
  using V = typename Simd<T>::V;
  constexpr int LANES = Simd<T>::LANES;
  V sum[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const std::int64_t at = i + u * LANES;
      sum[u] += *reinterpret_cast<const V*>(x + at) * *reinterpret_cast<const V*>(y + at);
    }
  }
  for (; i + LANES <= n; i += LANES) {
    sum[0] += *reinterpret_cast<const V*>(x + i) * *reinterpret_cast<const V*>(y + i);
  }
  T total = Simd<T>::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

}  // namespace fastreg
