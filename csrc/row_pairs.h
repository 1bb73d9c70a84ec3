// Inner products of the rows of a segment, on packed operands; what tells the forms of several ops apart is what they
// do with them. To be inlined into a function compiled for one instruction set (isa.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffer.h"
#include "gemm.h"

namespace fastreg {

// Columns packed at once: a block of 256 columns of 256 rows is 256 KB, within a level 2 cache.
constexpr std::int64_t kColumns = 256;

template <class G, class T>
struct RowPairs {
  std::int64_t stride;  // of the products, in numbers
  Buffer<T> left, right;

  explicit RowPairs(std::int64_t longest)
      : stride((longest + G::WIDTH - 1) / G::WIDTH * G::WIDTH),
        left(make_buffer<T>(G::packed(longest, std::max(longest, kColumns), G::TALL))),
        right(make_buffer<T>(std::max(G::packed(longest, kColumns, G::WIDTH), G::packed(kColumns, longest, G::WIDTH)))) {}

  // Room for the products of the longest segment.
  Buffer<T> products(std::int64_t longest) const { return make_buffer<T>(longest * stride); }

  // out[s, t] = q_s . k_t for rows [size, width]; with Band::kLower t <= s alone.
  FASTREG_INLINE void multiply(const T* q, const T* k, std::int64_t width, std::int64_t size, Band band, T* out) {
    for (std::int64_t i = 0; i < width; i += kColumns) {
      const std::int64_t depth = std::min(kColumns, width - i);
      G::template pack_columns<G::TALL>(q + i, width, size, depth, left.get());
      G::template pack_columns<G::WIDTH>(k + i, width, size, depth, right.get());
      G::multiply({left.get(), right.get(), size, size, depth, out, stride, T(1), i > 0, band});
    }
  }
};

}  // namespace fastreg
