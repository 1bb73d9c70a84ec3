// Each row is read from memory once: later passes over it find it in cache.
#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "machine.h"
#include "parallel.h"
#include "philox.h"
#include "simd.h"
#include "vector_math.h"

namespace fastreg {
namespace {

using Index = std::int64_t;

constexpr Index kIgnored = -100;
// Classes whose exponentials are summed together: a draw reads one such run of a row again.
constexpr Index kRun = 256;

// e[i] = exp(z[i] - top), where e may be z; returns their sum.
template <class T>
FASTREG_INLINE T exponentials(const T* z, T top, Index n, T* e) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Index i = 0; i < n; ++i) {
    const T x = exp_of(z[i] - top);
    e[i] = x;
    sum += x;
  }
  return sum;
}

template <class T>
FASTREG_INLINE T maximum(const T* z, Index n) {
  T top = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : top)
  for (Index i = 0; i < n; ++i) top = z[i] > top ? z[i] : top;
  return top;
}

// `value`, 0 where the label is ignored, NaN where it names no class.
template <class T>
FASTREG_INLINE T judged(T value, Index label, Index classes) {
  if (label == kIgnored) return 0;
  return label >= 0 && label < classes ? value : std::numeric_limits<T>::quiet_NaN();
}

// x[label], 0 where there is none.
template <class T>
FASTREG_INLINE T at_label(const T* x, Index label, Index classes) {
  return label >= 0 && label < classes ? x[label] : T(0);
}

double uniform(std::uint64_t seed, std::uint64_t draw, std::uint64_t row) {
  const Word word = philox({low_word(row), high_word(row), low_word(draw), high_word(draw)}, seed);
  return (word + 0.5) * 0x1p-32;
}

// The first of n exponentials at which the running sum, so far `before`, exceeds the target.
template <class T>
FASTREG_INLINE Index first_beyond(const T* e, Index n, double before, double target) {
  // Sums in another order may end just short of the target: then it is the last class that can occur.
  Index last = 0;
  for (Index i = 0; i < n; ++i) {
    before += e[i];
    if (before > target) return i;
    if (e[i] > 0) last = i;
  }
  return last;
}

struct Softmax {
  double lse;
  double total;  // sum of exp(z - max z)
  Index drawn;
  double drawn_loss;
};

// What one read of a row tells; exp(z - max z) is left in e, which may be z, unless it is null.
template <class T>
FASTREG_INLINE Softmax softmax_row(const T* z, Index n, double uniform, T* e, double* sums) {
  T scratch[kRun];
  const T top = maximum(z, n);
  const Index runs = (n + kRun - 1) / kRun;
  double total = 0;
  for (Index run = 0; run < runs; ++run) {
    const Index begin = run * kRun;
    sums[run] = exponentials(z + begin, top, std::min(kRun, n - begin), e ? e + begin : scratch);
    total += sums[run];
  }
  const double target = uniform * total;
  double before = 0;
  Index run = 0;
  for (; run < runs - 1 && !(before + sums[run] > target); ++run) before += sums[run];
  const Index begin = run * kRun, count = std::min(kRun, n - begin);
  if (!e && runs > 1) exponentials(z + begin, top, count, scratch);
  const T* of_run = e ? e + begin : scratch;
  const Index found = first_beyond(of_run, count, before, target);
  return {top + std::log(total), total, begin + found, std::log(total / of_run[found])};
}

template <class T>
FASTREG_INLINE void head_rows(const CrossEntropy<T>& p, Index begin, Index end, double* sums, const double* uniforms) {
  const Index n = p.classes;
  for (Index row = begin; row < end; ++row) {
    const T* z = p.z + row * n;
    T* dz = p.dz ? p.dz + row * n : nullptr;
    const T given = p.labels ? at_label(z, p.labels[row], n) : T(0);
    const Softmax found = softmax_row(z, n, uniforms[row - begin], dz, sums);
    const Index label = p.labels ? p.labels[row] : found.drawn;
    p.lse[row] = static_cast<T>(found.lse);
    p.drawn[row] = found.drawn;
    p.loss[row] = judged(static_cast<T>(p.labels ? found.lse - given : found.drawn_loss), label, n);
    if (!dz) continue;
    const T weight = judged(p.scale[row], label, n), factor = weight / static_cast<T>(found.total);
#pragma omp simd
    for (Index i = 0; i < n; ++i) dz[i] *= factor;
    if (label >= 0 && label < n) dz[label] -= weight;
  }
}

template <class T>
FASTREG_INLINE void backward_rows(const CrossEntropyBackward<T>& p, Index begin, Index end) {
  const Index n = p.classes;
  for (Index row = begin; row < end; ++row) {
    const T* __restrict__ z = p.z + row * n;
    T* __restrict__ dz = p.dz + row * n;
    const Index label = p.labels[row];
    const T weight = judged(p.scale[row], label, n), lse = p.lse[row];
#pragma omp simd
    for (Index i = 0; i < n; ++i) dz[i] = weight * exp_of(z[i] - lse);
    if (label >= 0 && label < n) dz[label] -= weight;
  }
}

template <class T>
FASTREG_INLINE void double_backward_rows(const CrossEntropyDoubleBackward<T>& p, Index begin, Index end) {
  const Index n = p.classes;
  for (Index row = begin; row < end; ++row) {
    const T* __restrict__ z = p.z + row * n;
    const T* __restrict__ v = p.v + row * n;
    T* __restrict__ grad_z = p.grad_z + row * n;
    const Index label = p.labels[row];
    const T weight = judged(p.scale[row], label, n), lse = p.lse[row];
    double total = 0;
    for (Index first = 0; first < n; first += kRun) {
      T sum = 0;
      const Index last = std::min(n, first + kRun);
#pragma omp simd reduction(+ : sum)
      for (Index i = first; i < last; ++i) {
        const T x = exp_of(z[i] - lse);
        grad_z[i] = x;
        sum += x * v[i];
      }
      total += sum;
    }
    const T mean = static_cast<T>(total);
#pragma omp simd
    for (Index i = 0; i < n; ++i) grad_z[i] *= weight * (v[i] - mean);
    p.grad_scale[row] = judged(mean - at_label(v, label, n), label, n);
  }
}

// Overloads, not templates, carry the clones: a template's clones have no symbol of their own.
#define FASTREG_ROWS(T)                                                                                              \
  FASTREG_CLONES void head_clone(const CrossEntropy<T>& p, Index begin, Index end, double* sums, const double* u) {   \
    head_rows(p, begin, end, sums, u);                                                                               \
  }                                                                                                                  \
  FASTREG_CLONES void backward_clone(const CrossEntropyBackward<T>& p, Index begin, Index end) {                     \
    backward_rows(p, begin, end);                                                                                    \
  }                                                                                                                  \
  FASTREG_CLONES void double_backward_clone(const CrossEntropyDoubleBackward<T>& p, Index begin, Index end) {        \
    double_backward_rows(p, begin, end);                                                                             \
  }
FASTREG_ROWS(float)
FASTREG_ROWS(double)
#undef FASTREG_ROWS

// run(begin, end) over runs of rows of about 16K numbers, enough to outweigh handing a task to a thread. An
// exponential counts as eight operations.
template <class Run>
void over_rows(Index rows, Index classes, int threads, const Run& run) {
  const Index grain = std::max<Index>(1, (Index{1} << 14) / classes);
  parallel_chunks(rows, grain, threads_for(rows * classes * 8, threads), run);
}

}  // namespace

template <class T>
void cross_entropy(const CrossEntropy<T>& p) {
  over_rows(p.rows, p.classes, p.threads, [&](Index begin, Index end) {
    std::vector<double> sums((p.classes + kRun - 1) / kRun), uniforms(end - begin);
    for (Index row = begin; row < end; ++row) uniforms[row - begin] = uniform(p.seed, p.draw, row);
    head_clone(p, begin, end, sums.data(), uniforms.data());
  });
}

template <class T>
void cross_entropy_backward(const CrossEntropyBackward<T>& p) {
  over_rows(p.rows, p.classes, p.threads, [&](Index begin, Index end) { backward_clone(p, begin, end); });
}

template <class T>
void cross_entropy_double_backward(const CrossEntropyDoubleBackward<T>& p) {
  over_rows(p.rows, p.classes, p.threads, [&](Index begin, Index end) { double_backward_clone(p, begin, end); });
}

#define FASTREG_INSTANTIATE(T)                                        \
  template void cross_entropy(const CrossEntropy<T>&);                \
  template void cross_entropy_backward(const CrossEntropyBackward<T>&); \
  template void cross_entropy_double_backward(const CrossEntropyDoubleBackward<T>&);
FASTREG_INSTANTIATE(float)
FASTREG_INSTANTIATE(double)
#undef FASTREG_INSTANTIATE

}  // namespace fastreg
