// Products of matrices that fit in a core's cache. Both operands are packed into panels along the reduction, so the
// inner loop reads two streams and keeps one register tile; a packed operand serves any number of products. Functions
// are templates on the instruction set and must be inlined into one compiled for it, as in attention_cpu.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace fastreg {

struct Range {
  std::int64_t from, to;
};

// How the left factor lies in memory: panels along the reduction, or as it was, with `left_stride` between its rows or,
// if its rows are the reduction, between those. Packing pays where a panel meets several panels of columns.
enum class Layout { kPacked, kByRows, kByDepth };

// Which part of a product is computed; the rest is left alone, or known to be zero.
enum class Band {
  kFull,
  kLower,    // results with j <= i, where i counts rows
  kColumns,  // results whose panel of columns meets the range of their panel of rows
  kDepth,    // the reduction runs over the range of the panel of rows
};

template <class T, int BYTES, int HEIGHT>
struct Gemm {
  typedef T V __attribute__((vector_size(BYTES), may_alias, aligned(alignof(T))));
  using Index = typename std::conditional<sizeof(T) == 4, std::int32_t, std::int64_t>::type;
  typedef Index Lanes __attribute__((vector_size(BYTES)));
  static constexpr int LANES = BYTES / sizeof(T);
  static constexpr int WIDTH = 2 * LANES;  // of a right panel
  // Of a left panel: one group of lanes at most, because packing stores whole vectors.
  static constexpr int TALL = HEIGHT < LANES ? HEIGHT : LANES;

  // Numbers in `size` packed to panels of N over `depth`; the last store of a panel may reach past it.
  static std::int64_t packed(std::int64_t size, std::int64_t depth, int n) {
    return (size + n - 1) / n * n * depth + LANES;
  }

  static FASTREG_INLINE const V& load(const T* from) { return *reinterpret_cast<const V*>(from); }
  static FASTREG_INLINE void store(T* to, const V& value) { *reinterpret_cast<V*>(to) = value; }

  // Panels of a matrix stored with the reduction along its rows: from [depth, size].
  template <int N>
  static FASTREG_INLINE void pack_rows(const T* from, std::int64_t stride, std::int64_t size, std::int64_t depth, T* to) {
    for (std::int64_t i = 0; i < size; i += N) {
      const int own = static_cast<int>(std::min<std::int64_t>(N, size - i));
      for (std::int64_t k = 0; k < depth; ++k, to += N) {
        const T* row = from + k * stride + i;
        if (own == N) {
          // Of constant size: a few vector moves.
          std::memcpy(to, row, N * sizeof(T));
        } else {
          for (int j = 0; j < N; ++j) to[j] = j < own ? row[j] : T(0);
        }
      }
    }
  }

  // Panels of a matrix stored with the reduction along its columns: from [size, depth].
  template <int N>
  static FASTREG_INLINE void pack_columns(const T* from, std::int64_t stride, std::int64_t size, std::int64_t depth,
                                          T* to) {
    for (std::int64_t i = 0; i < size; i += N, to += N * depth) {
      for (int group = 0; group < N; group += LANES) {
        const int wanted = std::min(LANES, N - group);
        const int own = static_cast<int>(std::clamp<std::int64_t>(size - i - group, 0, wanted));
        pack_group<N>(from + (i + group) * stride, stride, own, depth, to + group);
      }
    }
  }

  template <int N>
  static FASTREG_INLINE void pack_group(const T* from, std::int64_t stride, int own, std::int64_t depth, T* to) {
    std::int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
      V rows[LANES] = {};
      for (int r = 0; r < own; ++r) rows[r] = load(from + r * stride + k);
      transpose(rows);
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) store(to + (k + r) * N, rows[r]);
    }
    const int width = std::min(LANES, N);
    for (; k < depth; ++k) {
      for (int r = 0; r < width; ++r) to[k * N + r] = r < own ? from[r * stride + k] : T(0);
    }
  }

  // Exchanges blocks of 1, 2, 4, ... lanes between pairs of rows.
  static FASTREG_INLINE void transpose(V (&rows)[LANES]) {
#pragma GCC unroll 4
    for (int half = 1; half < LANES; half *= 2) {
      Lanes low, high;
#pragma GCC unroll 16
      for (int lane = 0; lane < LANES; ++lane) {
        low[lane] = lane & half ? LANES + lane - half : lane;
        high[lane] = lane & half ? LANES + lane : lane + half;
      }
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) {
        if (r & half) continue;
        const V a = rows[r], b = rows[r + half];
        rows[r] = __builtin_shuffle(a, b, low);
        rows[r + half] = __builtin_shuffle(a, b, high);
      }
    }
  }

  // out[i, j] = alpha sum_k left[k, i] right[k, j], added to what is there if `add`.
  struct Product {
    const T* left;   // panels of TALL over depth
    const T* right;  // panels of WIDTH over depth
    std::int64_t rows, columns, depth;
    T* out;
    std::int64_t stride;
    T alpha;
    bool add;
    Band band;
    const Range* ranges = nullptr;  // one per panel of `left`
    std::int64_t left_stride = 0;
  };

  template <Layout L = Layout::kPacked>
  static FASTREG_INLINE void multiply(const Product& p) {
    // A right panel stays in the first cache while the left ones pass by.
    for (std::int64_t j = 0; j < p.columns; j += WIDTH) {
      const std::int64_t first = p.band == Band::kLower ? j / TALL * TALL : 0;
      for (std::int64_t i = first; i < p.rows; i += TALL) {
        Range depth = {0, p.depth};
        if (p.ranges != nullptr) {
          const Range range = p.ranges[i / TALL];
          if (p.band == Band::kDepth) depth = range;
          else if (range.to <= j || j + WIDTH <= range.from) continue;
        }
        tile<L>(p, i, j, depth);
      }
    }
  }

  template <Layout L>
  static FASTREG_INLINE void tile(const Product& p, std::int64_t i, std::int64_t j, Range depth) {
    V sum[TALL][2] = {};
    const T* right = p.right + j * p.depth + depth.from * WIDTH;
    if constexpr (L == Layout::kByRows) {
      // Rows past the last are copies of it, which `edge` leaves out.
      const T* left[TALL];
      for (int r = 0; r < TALL; ++r) left[r] = p.left + std::min(i + r, p.rows - 1) * p.left_stride;
      for (std::int64_t k = depth.from; k < depth.to; ++k, right += WIDTH) {
        const V first = load(right), second = load(right + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < TALL; ++r) {
          sum[r][0] += first * left[r][k];
          sum[r][1] += second * left[r][k];
        }
      }
    } else {
      const bool packed = L == Layout::kPacked;
      const std::int64_t step = packed ? TALL : p.left_stride;
      const T* left = p.left + (packed ? i * p.depth : i) + depth.from * step;
      for (std::int64_t k = depth.from; k < depth.to; ++k, left += step, right += WIDTH) {
        const V first = load(right), second = load(right + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < TALL; ++r) {
          sum[r][0] += first * left[r];
          sum[r][1] += second * left[r];
        }
      }
    }
    const int rows = static_cast<int>(std::min<std::int64_t>(TALL, p.rows - i));
    T* out = p.out + i * p.stride + j;
    if (rows == TALL && j + WIDTH <= p.columns) {
#pragma GCC unroll 16
      for (int r = 0; r < TALL; ++r, out += p.stride) {
        store(out, p.add ? load(out) + p.alpha * sum[r][0] : p.alpha * sum[r][0]);
        store(out + LANES, p.add ? load(out + LANES) + p.alpha * sum[r][1] : p.alpha * sum[r][1]);
      }
    } else {
      edge(p, sum, out, rows, static_cast<int>(std::min<std::int64_t>(WIDTH, p.columns - j)));
    }
  }

  // Not inlined into the loop's registers: the indices are variable.
  static FASTREG_INLINE void edge(const Product& p, const V (&sum)[TALL][2], T* out, int rows, int columns) {
    T values[TALL][WIDTH];
#pragma GCC unroll 16
    for (int r = 0; r < TALL; ++r) {
      store(values[r], sum[r][0]);
      store(values[r] + LANES, sum[r][1]);
    }
    for (int r = 0; r < rows; ++r, out += p.stride) {
      for (int c = 0; c < columns; ++c) out[c] = (p.add ? out[c] : T(0)) + p.alpha * values[r][c];
    }
  }
};

}  // namespace fastreg
