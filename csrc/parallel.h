// The one place that opens OpenMP regions.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastreg {

// Elementary operations below which waking another thread costs more than it saves.
constexpr std::int64_t kWorkPerThread = 1 << 15;

// Threads worth using for this much work, at most `available`.
inline int threads_for(std::int64_t work, int available) {
  const std::int64_t useful = std::max<std::int64_t>(1, work / kWorkPerThread);
  return static_cast<int>(std::min<std::int64_t>(useful, available));
}

// body(i) for i in [0, n). Which thread runs which i changes nothing: bodies write disjoint results.
template <class Body>
void parallel_for(std::int64_t n, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && n > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t i = 0; i < n; ++i) body(i);
    return;
  }
#endif
  for (std::int64_t i = 0; i < n; ++i) body(i);
}

// body(begin, end) over chunks of [0, n) of at most `grain` elements. Chunks depend on the grain
// alone, so per-chunk results do not depend on the number of threads.
template <class Body>
void parallel_chunks(std::int64_t n, std::int64_t grain, int threads, const Body& body) {
  parallel_for((n + grain - 1) / grain, threads,
               [&](std::int64_t chunk) { body(chunk * grain, std::min(n, (chunk + 1) * grain)); });
}

}  // namespace fastreg
