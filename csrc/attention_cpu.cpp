// Per head, with S = c Q K^T + mask, P = softmax(S), factors M of dropout, dP = M (D V^T), dS = P (dP - rowsum(P dP)):
//   forward          O = (M P) V
//   backward         dQ = c dS K,  dK = c dS^T Q,  dV = (M P)^T D
//   double backward  R = c (vQ K^T + Q vK^T),  R -= rowsum(P R),  Z = P M (D vV^T) + dS R,  Z -= P rowsum(Z)
//                    grad_D = (M P) vV + (M P R) V,  grad_V = (M P R)^T D
//                    grad_Q = c (Z K + dS vK),  grad_K = c (Z^T Q + dS^T vQ)
// A thread takes a head of keys with all that its queries add to it, so that sums do not depend on threads.
#include "attention.h"

#include <cmath>
#include <type_traits>

#include "attention_block.h"
#include "isa.h"
#include "parallel.h"
#include "vector_math.h"

namespace fastreg {
namespace {

template <class T>
FASTREG_INLINE T row_dot(const T* a, const T* b, Range range) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = range.from; j < range.to; ++j) total += a[j] * b[j];
  return total;
}

template <class T>
FASTREG_INLINE void multiply_row(T* __restrict__ a, const T* __restrict__ b, Range range) {
#pragma omp simd
  for (std::int64_t j = range.from; j < range.to; ++j) a[j] *= b[j];
}

// A block with the matrices that the three functions keep of it.
template <class G, class T>
struct Head : Block<G, T> {
  using Block<G, T>::pattern;
  using Block<G, T>::rows;
  using Block<G, T>::seen;
  using Block<G, T>::stride;
  bool dropping;
  Buffer<T> p, m, ds, r, z;

  template <class Task>
  explicit Head(const Task& t)
      : Block<G, T>(t.shape, t.pattern), dropping(t.pattern.threshold > 0), p(this->scores()) {
    if (dropping) m = this->scores();
    if (!std::is_same_v<Task, AttentionForward<T>>) ds = this->scores();
    if (std::is_same_v<Task, AttentionDoubleBackward<T>>) r = this->scores(), z = this->scores();
  }

  std::int64_t of_queries() const {
    return (this->sample * this->shape.heads + this->head) * this->shape.queries;
  }
  std::int64_t of_keys() const {
    const std::int64_t shared = this->head / this->shape.group();
    return (this->sample * this->shape.shared + shared) * this->shape.keys * this->shape.width;
  }
  Rows<T> query(const Operand<T>& x) const { return x.at(this->sample, this->head); }
  Rows<T> key(const Operand<T>& x) const { return x.at(this->sample, this->head / this->shape.group()); }

  // p = M P, and lse
  FASTREG_INLINE void softmax(T* lse) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const Range range = seen[i];
      T* __restrict__ weights = p.get() + i * stride;
      this->mask_scores(i, weights);
      T top = -std::numeric_limits<T>::infinity(), sum = 0;
#pragma omp simd reduction(max : top)
      for (std::int64_t j = range.from; j < range.to; ++j) top = weights[j] > top ? weights[j] : top;
      // A query that sees no key: every exponential is that of -inf.
      if (std::isinf(top) && top < 0) top = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t j = range.from; j < range.to; ++j) {
        const T e = exp_of(weights[j] - top);
        weights[j] = e;
        sum += e;
      }
      lse[i] = sum == 0 ? std::numeric_limits<T>::infinity() : top + std::log(sum);
      const T share = sum == 0 ? T(0) : 1 / sum;
#pragma omp simd
      for (std::int64_t j = range.from; j < range.to; ++j) weights[j] *= share;
      if (dropping) {
        this->draw_factors(i, m.get());
        multiply_row(weights, m.get(), range);
      }
      this->clear_rest(i, weights);
    }
  }

  // Of row i, from its scores and dP: p = P, ds = dS and, with dropout, m = M.
  FASTREG_INLINE void gradient(std::int64_t i, T offset) {
    const Range range = seen[i];
    T* __restrict__ weights = p.get() + i * stride;
    T* __restrict__ out = ds.get() + i * stride;
    this->mask_scores(i, weights);
#pragma omp simd
    for (std::int64_t j = range.from; j < range.to; ++j) weights[j] = exp_of(weights[j] - offset);
    if (dropping) {
      this->draw_factors(i, m.get() + i * stride);
      multiply_row(out, m.get() + i * stride, range);
    }
    const T delta = row_dot(weights, out, range);
#pragma omp simd
    for (std::int64_t j = range.from; j < range.to; ++j) out[j] = weights[j] * (out[j] - delta);
    this->clear_rest(i, weights);
    this->clear_rest(i, out);
  }

  // Of row i: r = P R, z = Z, from r = R before its row sums are taken off and z = D vV^T.
  FASTREG_INLINE void tangent(std::int64_t i) {
    const Range range = seen[i];
    const T* __restrict__ weights = p.get() + i * stride;
    const T* __restrict__ first = ds.get() + i * stride;
    T* __restrict__ products = r.get() + i * stride;
    T* __restrict__ out = z.get() + i * stride;
    if (dropping) multiply_row(out, m.get() + i * stride, range);
    const T rho = row_dot(weights, products, range);
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (std::int64_t j = range.from; j < range.to; ++j) {
      const T centred = products[j] - rho;
      products[j] = weights[j] * centred;
      out[j] = weights[j] * out[j] + first[j] * centred;
      total += out[j];
    }
#pragma omp simd
    for (std::int64_t j = range.from; j < range.to; ++j) out[j] -= weights[j] * total;
    this->clear_rest(i, products);
    this->clear_rest(i, out);
  }

  FASTREG_INLINE void drop(std::int64_t i, const Buffer<T>& weights) {
    if (dropping) multiply_row(weights.get() + i * stride, m.get() + i * stride, seen[i]);
  }

  FASTREG_INLINE void run(const AttentionForward<T>& t) {
    this->multiply({{query(t.q), key(t.k), pattern.scale, p.get()}});
    softmax(t.lse + of_queries() + this->begin);
    this->weigh({{p.get(), key(t.v), 1, t.out + of_queries() * this->shape.width}});
  }

  FASTREG_INLINE void run(const AttentionBackward<T>& t) {
    const T c = pattern.scale;
    const T* lse = t.lse + of_queries() + this->begin;
    this->multiply({{query(t.q), key(t.k), c, p.get()}, {query(t.d), key(t.v), 1, ds.get()}});
    for (std::int64_t i = 0; i < rows; ++i) {
      gradient(i, lse[i]);
      drop(i, p);
    }
    this->weigh({{ds.get(), key(t.k), c, t.dq + of_queries() * this->shape.width}});
    this->gather({{ds.get(), query(t.q), c, t.dk + of_keys()}, {p.get(), query(t.d), 1, t.dv + of_keys()}});
  }

  FASTREG_INLINE void run(const AttentionDoubleBackward<T>& t) {
    const T c = pattern.scale;
    const T* lse = t.lse + of_queries() + this->begin;
    T* grad_d = t.grad_d + of_queries() * this->shape.width;
    T* grad_q = t.grad_q + of_queries() * this->shape.width;
    this->multiply({{query(t.q), key(t.k), c, p.get()},
                    {query(t.vq), key(t.k), c, r.get()},
                    {query(t.q), key(t.vk), c, r.get(), true},
                    {query(t.d), key(t.v), 1, ds.get()},
                    {query(t.d), key(t.vv), 1, z.get()}});
    for (std::int64_t i = 0; i < rows; ++i) {
      gradient(i, lse[i]);
      tangent(i);
      drop(i, p);
      drop(i, r);
    }
    this->weigh({{p.get(), key(t.vv), 1, grad_d},
                 {r.get(), key(t.v), 1, grad_d, true},
                 {z.get(), key(t.k), c, grad_q},
                 {ds.get(), key(t.vk), c, grad_q, true}});
    this->gather({{r.get(), query(t.d), 1, t.grad_v + of_keys()},
                  {z.get(), query(t.q), c, t.grad_k + of_keys()},
                  {ds.get(), query(t.vq), c, t.grad_k + of_keys()}});
  }
};

struct Heads {
  // Of every head of keys in the range: all blocks of all its queries.
  template <class G, class Task>
  static FASTREG_INLINE void run(const Task& task, std::int64_t from, std::int64_t to) {
    using T = std::remove_const_t<decltype(task.pattern.scale)>;
    const std::int64_t group = task.shape.group();
    Head<G, T> block(task);
    for (std::int64_t i = from * group; i < to * group; ++i) {
      block.enter(i / task.shape.heads, i % task.shape.heads);
      for (std::int64_t begin = 0; begin < task.shape.queries; begin += block.rows) {
        block.open(begin);
        block.run(task);
      }
    }
  }
};

template <class T, class Task>
void run_all(const Task& task) {
  const auto run = PerIsa<T, Heads, const Task&, std::int64_t, std::int64_t>::best();
  const AttentionShape& s = task.shape;
  const std::int64_t heads = s.samples * s.shared;
  const int threads = threads_for(heads * s.group() * s.queries * s.keys * s.width / 8, task.threads);
  const std::int64_t grain = std::max<std::int64_t>(1, heads / (4 * threads));
  parallel_chunks(heads, grain, threads, [&](std::int64_t from, std::int64_t to) { run(task, from, to); });
}

}  // namespace

template <class T>
void attention_forward(const AttentionForward<T>& p) {
  run_all<T>(p);
}
template <class T>
void attention_backward(const AttentionBackward<T>& p) {
  run_all<T>(p);
}
template <class T>
void attention_double_backward(const AttentionDoubleBackward<T>& p) {
  run_all<T>(p);
}

template void attention_forward(const AttentionForward<float>&);
template void attention_forward(const AttentionForward<double>&);
template void attention_backward(const AttentionBackward<float>&);
template void attention_backward(const AttentionBackward<double>&);
template void attention_double_backward(const AttentionDoubleBackward<float>&);
template void attention_double_backward(const AttentionDoubleBackward<double>&);

}  // namespace fastreg
