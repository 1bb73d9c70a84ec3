// Each tensor is read from memory once per call: the second loop over a row finds it in cache. Work is cut into
// (run of samples, group), so that the sums of one task meet only its own channels.
#include "norm_affine.h"

#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "machine.h"
#include "norm_affine_rows.h"
#include "parallel.h"

namespace fastreg {
namespace {

// Tasks worth having, whatever the number of threads: results must not depend on it.
constexpr std::int64_t kTasks = 16;

std::int64_t runs_for(std::int64_t tasks) { return (kTasks + tasks - 1) / std::max<std::int64_t>(1, tasks); }

// Samples [begin, end) of one group.
struct Run {
  std::int64_t group;
  std::int64_t begin;
  std::int64_t end;
};

Run run_of(std::int64_t group, std::int64_t first, std::int64_t last, std::int64_t number, std::int64_t runs) {
  const std::int64_t samples = last - first;
  return {group, first + samples * number / runs, first + samples * (number + 1) / runs};
}

template <class T>
FASTREG_INLINE void forward_run(const NormAffine<T>& p, const Run& run) {
  const NormShape& shape = p.shape;
  const std::int64_t first = run.group * shape.channels, n = shape.width();
  for (std::int64_t s = run.begin; s < run.end; ++s) {
    const std::int64_t row = s * shape.groups + run.group;
    const T* x = p.x + row * n;
    const Moments<T> m = moments(x, n, p.eps, p.center);
    p.mean[row] = m.mean;
    p.rstd[row] = m.rstd;
    scale_row(x, m, p.weight + first, p.bias == nullptr ? nullptr : p.bias + first, p.y + row * n, shape);
  }
}

// Sums into scale and bias [channels] of the group.
template <class T>
FASTREG_INLINE void backward_run(const NormAffineBackward<T>& p, const Run& run, T* scale, T* bias) {
  const NormShape& shape = p.shape;
  std::fill(scale, scale + shape.channels, T(0));
  std::fill(bias, bias + shape.channels, T(0));
  for (std::int64_t s = run.begin; s < run.end; ++s) {
    const std::int64_t row = s * shape.groups + run.group, at = row * shape.width();
    const BackwardRow<T> in{p.x + at, p.d + at, p.weight + run.group * shape.channels, {p.mean[row], p.rstd[row]}};
    if (shape.places == 1) {
      backward_adjacent(in, shape.channels, p.center, scale, bias, p.dx + at);
    } else {
      backward_spread(in, shape, p.center, scale, bias, p.dx + at);
    }
  }
}

// Sums into grad_weight [channels] of the group; `sums` has room for 3 channels.
template <class T>
FASTREG_INLINE void double_backward_run(const NormAffineDoubleBackward<T>& p, const Run& run, T* grad_weight,
                                        T* sums) {
  const NormShape& shape = p.shape;
  const std::int64_t first = run.group * shape.channels;
  std::fill(grad_weight, grad_weight + shape.channels, T(0));
  std::int64_t k = 0;
  for (std::int64_t s = run.begin; s < run.end; ++s) {
    while (p.offsets[k + 1] <= s) ++k;
    const std::int64_t row = s * shape.groups + run.group, at = row * shape.width();
    const std::int64_t of_segment = k * shape.parameters() + first;
    const DoubleRow<T> in{p.x + at,           p.d + at,
                          p.v + at,           p.weight + first,
                          p.v_scale + of_segment, p.v_bias + of_segment,
                          {p.mean[row], p.rstd[row]}};
    if (shape.places == 1) {
      double_backward_adjacent(in, shape.channels, p.center, p.grad_d + at, p.grad_x + at, grad_weight);
    } else {
      double_backward_spread(in, shape, p.center, p.grad_d + at, p.grad_x + at, grad_weight, sums);
    }
  }
}

// Overloads, not templates, carry the clones: a template's clones have no symbol of their own.
#define FASTREG_CLONED(T)                                                                                        \
  FASTREG_CLONES void forward_clone(const NormAffine<T>& p, const Run& run) { forward_run(p, run); }             \
  FASTREG_CLONES void backward_clone(const NormAffineBackward<T>& p, const Run& run, T* scale, T* bias) {        \
    backward_run(p, run, scale, bias);                                                                           \
  }                                                                                                              \
  FASTREG_CLONES void double_backward_clone(const NormAffineDoubleBackward<T>& p, const Run& run, T* grad_weight, \
                                            T* sums) {                                                           \
    double_backward_run(p, run, grad_weight, sums);                                                              \
  }
FASTREG_CLONED(float)
FASTREG_CLONED(double)
#undef FASTREG_CLONED

// out[i] = sum over runs of parts[run, i].
template <class T>
void add_parts(const T* parts, std::int64_t runs, std::int64_t n, T* out) {
  std::copy(parts, parts + n, out);
  for (std::int64_t run = 1; run < runs; ++run) {
    for (std::int64_t i = 0; i < n; ++i) out[i] += parts[run * n + i];
  }
}

}  // namespace

template <class T>
void norm_affine(const NormAffine<T>& p) {
  const NormShape& shape = p.shape;
  const std::int64_t runs = runs_for(shape.groups);
  parallel_for(runs * shape.groups, threads_for(shape.numbers(), p.threads), [&](std::int64_t task) {
    forward_clone(p, run_of(task % shape.groups, 0, shape.samples, task / shape.groups, runs));
  });
}

template <class T>
void norm_affine_backward(const NormAffineBackward<T>& p) {
  const NormShape& shape = p.shape;
  const std::int64_t all = shape.parameters(), runs = runs_for(p.segments * shape.groups);
  const std::int64_t size = p.segments * all;
  const Buffer<T> parts = make_buffer<T>(runs == 1 ? 0 : 2 * runs * size);
  // Of run r of segment k: scale parts[0, k, r], bias parts[1, k, r]; with one run that is the result's own layout.
  T* scale = runs == 1 ? p.scale : parts.get();
  T* bias = runs == 1 ? p.bias : parts.get() + runs * size;
  parallel_for(p.segments * runs * shape.groups, threads_for(shape.numbers(), p.threads), [&](std::int64_t task) {
    const std::int64_t group = task % shape.groups, part = task / shape.groups, k = part / runs;
    const Run run = run_of(group, p.offsets[k], p.offsets[k + 1], part % runs, runs);
    const std::int64_t at = part * all + group * shape.channels;
    backward_clone(p, run, scale + at, bias + at);
  });
  for (std::int64_t k = 0; runs > 1 && k < p.segments; ++k) {
    add_parts(scale + k * runs * all, runs, all, p.scale + k * all);
    add_parts(bias + k * runs * all, runs, all, p.bias + k * all);
  }
}

template <class T>
void norm_affine_double_backward(const NormAffineDoubleBackward<T>& p) {
  const NormShape& shape = p.shape;
  const std::int64_t all = shape.parameters(), runs = runs_for(shape.groups);
  const Buffer<T> parts = make_buffer<T>(4 * runs * all);
  T* sums = parts.get() + runs * all;
  parallel_for(runs * shape.groups, threads_for(shape.numbers(), p.threads), [&](std::int64_t task) {
    const std::int64_t group = task % shape.groups, run = task / shape.groups;
    const std::int64_t at = run * all + group * shape.channels;
    double_backward_clone(p, run_of(group, 0, shape.samples, run, runs), parts.get() + at, sums + 3 * at);
  });
  add_parts(parts.get(), runs, all, p.grad_weight);
}

#define FASTREG_INSTANTIATE(T)                                  \
  template void norm_affine(const NormAffine<T>&);              \
  template void norm_affine_backward(const NormAffineBackward<T>&); \
  template void norm_affine_double_backward(const NormAffineDoubleBackward<T>&);
FASTREG_INSTANTIATE(float)
FASTREG_INSTANTIATE(double)
#undef FASTREG_INSTANTIATE

}  // namespace fastreg
