// Some consecutive queries of one head, the keys they see, and the matrix products between them.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "gemm.h"
#include "philox.h"

namespace fastreg {

// So many that packed keys are used often, so few that their scores with some hundred keys stay in the second cache;
// half and twice as many cost up to a tenth more.
constexpr std::int64_t kBlockQueries = 128;

// G is a Gemm. Ranges of keys count from `low`, ranges of queries from `begin`.
template <class G, class T>
struct Block {
  const AttentionShape shape;
  const Pattern<T> pattern;
  const std::int64_t most, widest;  // queries of a block, and keys that they see
  std::int64_t stride;              // of a row of scores
  Buffer<T> right, added;
  const char* mask_row = nullptr;  // what `added` was made of
  std::vector<Range> seen, of_queries, of_keys;
  std::int64_t sample = 0, head = 0, begin = 0, rows = 0, low = 0, keys = 0;

  Block(const AttentionShape& s, const Pattern<T>& p)
      : shape(s),
        pattern(p),
        most(even(s.queries)),
        widest(p.left >= 0 && p.right >= 0 ? std::min(s.keys, most + p.left + p.right) : s.keys),
        stride((widest + G::WIDTH - 1) / G::WIDTH * G::WIDTH),
        right(make_buffer<T>(std::max(G::packed(widest, s.width, G::WIDTH),
                                      G::packed(s.width, std::max(widest, most), G::WIDTH)))),
        added(make_buffer<T>(widest)),
        seen(most),
        of_queries((most + G::TALL - 1) / G::TALL),
        of_keys((widest + G::TALL - 1) / G::TALL) {}

  // Queries of a block, in whole panels, so that all blocks are about as long.
  static std::int64_t even(std::int64_t queries) {
    const std::int64_t blocks = (queries + kBlockQueries - 1) / kBlockQueries;
    const std::int64_t length = blocks == 0 ? 0 : (queries + blocks - 1) / blocks;
    return std::min(queries, (length + G::TALL - 1) / G::TALL * G::TALL);
  }

  // Panels of the last row may be read past its end.
  Buffer<T> scores() const { return make_buffer<T>(most * stride + G::TALL); }

  // The keys that a query may see by window and spans.
  Range near(std::int64_t query) const {
    Range range = {0, shape.keys};
    if (pattern.left >= 0) range.from = std::max(range.from, query - pattern.left);
    if (pattern.right >= 0) range.to = std::min(range.to, query + pattern.right + 1);
    if (pattern.spans != nullptr) {
      range.from = std::max<std::int64_t>(range.from, pattern.spans[query]);
      range.to = std::min<std::int64_t>(range.to, pattern.spans[shape.queries + query]);
    }
    return {range.from, std::max(range.from, range.to)};
  }

  // Which head of queries the products are of.
  void enter(std::int64_t to_sample, std::int64_t to_head) {
    sample = to_sample;
    head = to_head;
    mask_row = nullptr;
  }

  // Makes the queries from `first` on the block's, as many as fit.
  void open(std::int64_t first) {
    begin = first;
    rows = std::min(most, shape.queries - first);
    low = shape.keys;
    std::int64_t end = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
      seen[i] = near(begin + i);
      if (seen[i].from == seen[i].to) continue;
      low = std::min(low, seen[i].from);
      end = std::max(end, seen[i].to);
    }
    keys = std::max<std::int64_t>(0, end - low);
    mask_row = nullptr;
    find_panels();
  }

  // What the panels of queries and of keys see of each other.
  void find_panels() {
    std::fill(of_queries.begin(), of_queries.end(), Range{keys, 0});
    std::fill(of_keys.begin(), of_keys.end(), Range{rows, 0});
    for (std::int64_t i = 0; i < rows; ++i) {
      if (seen[i].from == seen[i].to) {
        seen[i] = {0, 0};
        continue;
      }
      seen[i] = {seen[i].from - low, seen[i].to - low};
      join(of_queries[i / G::TALL], seen[i]);
      for (std::int64_t j = seen[i].from / G::TALL; j * G::TALL < seen[i].to; ++j) join(of_keys[j], {i, i + 1});
    }
  }

  static void join(Range& range, Range more) {
    range = {std::min(range.from, more.from), std::max(range.to, more.to)};
  }

  // scores (+)= alpha queries keys^T
  struct Pair {
    Rows<T> queries, keys;
    T alpha;
    T* scores;
    bool add = false;
  };

  // One copy of the product's code for all of them: it is compiled for every instruction set.
  FASTREG_INLINE void multiply(std::initializer_list<Pair> pairs) {
    const T* packed = nullptr;
#pragma GCC unroll 1
    for (const Pair& pair : pairs) {
      const Rows<T> a = pair.queries.from(begin), b = pair.keys.from(low);
      if (b.data != packed) G::template pack_columns<G::WIDTH>(b.data, b.stride, keys, shape.width, right.get());
      packed = b.data;
      G::template multiply<Layout::kByRows>({a.data, right.get(), rows, keys, shape.width, pair.scores, stride,
                                             pair.alpha, pair.add, Band::kColumns, of_queries.data(), a.stride});
    }
  }

  // out (+)= alpha weights x
  struct Sum {
    const T* weights;
    Rows<T> x;
    T alpha;
    T* out;
    bool add = false;
  };

  // Of weights [rows, keys] and x of the keys, out of the queries.
  FASTREG_INLINE void weigh(std::initializer_list<Sum> sums) {
#pragma GCC unroll 1
    for (const Sum& sum : sums) {
      const Rows<T> x = sum.x.from(low);
      G::template pack_rows<G::WIDTH>(x.data, x.stride, shape.width, keys, right.get());
      G::template multiply<Layout::kByRows>({sum.weights, right.get(), rows, shape.width, keys,
                                             sum.out + begin * shape.width, shape.width, sum.alpha, sum.add,
                                             Band::kDepth, of_queries.data(), stride});
    }
  }

  // Of weights [rows, keys] transposed and x of the queries, added to out of the keys.
  FASTREG_INLINE void gather(std::initializer_list<Sum> sums) {
#pragma GCC unroll 1
    for (const Sum& sum : sums) {
      const Rows<T> x = sum.x.from(begin);
      G::template pack_rows<G::WIDTH>(x.data, x.stride, shape.width, rows, right.get());
      G::template multiply<Layout::kByDepth>({sum.weights, right.get(), keys, shape.width, rows,
                                              sum.out + low * shape.width, shape.width, sum.alpha, true, Band::kDepth,
                                              of_keys.data(), stride});
    }
  }

  // Adds the mask to row i of the scores.
  FASTREG_INLINE void mask_scores(std::int64_t i, T* scores) {
    if (pattern.mask == nullptr) return;
    const std::int64_t at = sample * pattern.strides[0] + head * pattern.strides[1] + (begin + i) * pattern.strides[2] +
                            low * pattern.strides[3];
    const char* row = static_cast<const char*>(pattern.mask) + at * (pattern.boolean ? 1 : sizeof(T));
    if (row != mask_row) read_mask(row);
    mask_row = row;
    const T* __restrict__ more = added.get();
#pragma omp simd
    for (std::int64_t j = seen[i].from; j < seen[i].to; ++j) scores[j] += more[j];
  }

  // All keys of the block: rows with a common mask see different ones.
  FASTREG_INLINE void read_mask(const char* row) {
    T* __restrict__ to = added.get();
    const std::int64_t step = pattern.strides[3];
    if (pattern.boolean) {
      const T hidden = -std::numeric_limits<T>::infinity();
      for (std::int64_t j = 0; j < keys; ++j) to[j] = row[j * step] ? T(0) : hidden;
    } else {
      const T* values = reinterpret_cast<const T*>(row);
      for (std::int64_t j = 0; j < keys; ++j) to[j] = values[j * step];
    }
  }

  // Dropout factors of row i.
  FASTREG_INLINE void draw_factors(std::int64_t i, T* factors) const {
    const Word query = low_word(begin + i), of_head = low_word(sample * shape.heads + head), first = low_word(low);
#pragma omp simd
    for (std::int64_t j = seen[i].from; j < seen[i].to; ++j) {
      const Word word = philox({first + low_word(j), query, of_head, 0}, pattern.seed);
      factors[j] = word >= pattern.threshold ? pattern.factor : T(0);
    }
  }

  // Zero where row i of the scores has no entry: products run over whole panels.
  FASTREG_INLINE void clear_rest(std::int64_t i, T* row) const {
    std::fill(row, row + seen[i].from, T(0));
    std::fill(row + seen[i].to, row + keys, T(0));
  }
};

}  // namespace fastreg
