// A segment is one block of memory, so each is cut into pieces of fixed length whose sums are added in
// order: float sums stay short, and the result does not depend on the number of threads.
#include "segment_dot.h"

#include <vector>

#include "machine.h"
#include "parallel.h"
#include "simd.h"

namespace fastreg {
namespace {

// 2 x 32 KB of floats per piece.
constexpr std::int64_t kPiece = 8192;

template <class T>
struct Piece {
  const T* x;
  const T* y;
  std::int64_t size;
  std::int64_t segment;
};

FASTREG_CLONES double piece_sum(const Piece<float>& piece) { return dot(piece.x, piece.y, piece.size); }
FASTREG_CLONES double piece_sum(const Piece<double>& piece) { return dot(piece.x, piece.y, piece.size); }

}  // namespace

template <class T>
void segment_dot(const SegmentDot<T>& p) {
  std::vector<Piece<T>> pieces;
  for (std::int64_t k = 0; k < p.segments; ++k) {
    const std::int64_t end = p.offsets[k + 1] * p.width;
    for (std::int64_t i = p.offsets[k] * p.width; i < end; i += kPiece) {
      pieces.push_back({p.x + i, p.y + i, std::min(kPiece, end - i), k});
    }
  }
  const std::int64_t count = static_cast<std::int64_t>(pieces.size());
  std::vector<double> sums(pieces.size()), totals(p.segments, 0.0);
  const int threads = threads_for(p.offsets[p.segments] * p.width, p.threads);
  parallel_chunks(count, 16, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) sums[i] = piece_sum(pieces[i]);
  });
  for (std::int64_t i = 0; i < count; ++i) totals[pieces[i].segment] += sums[i];
  for (std::int64_t k = 0; k < p.segments; ++k) p.out[k] = static_cast<T>(totals[k]);
}

template void segment_dot(const SegmentDot<float>&);
template void segment_dot(const SegmentDot<double>&);

}  // namespace fastreg
