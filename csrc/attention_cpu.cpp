// Per head, with S = c Q K^T, P = softmax(S), dP = D V^T, dS = P (dP - rowsum(P dP)):
//   backward         dQ = c dS K,  dK = c dS^T Q,  dV = P^T D
//   double backward  R = c (vQ K^T + Q vK^T),  R -= rowsum(P R),  Z = P (D vV^T) + dS R,  Z -= P rowsum(Z)
//                    grad_D = P vV + (P R) V,  grad_V = (P R)^T D
//                    grad_Q = c (Z K + dS vK),  grad_K = c (Z^T Q + dS^T vQ)
// A causal head computes the lower triangles alone.
#include "attention.h"

#include <cmath>
#include <type_traits>

#include "buffer.h"
#include "gemm.h"
#include "isa.h"
#include "parallel.h"
#include "vector_math.h"

namespace fastreg {
namespace {

// The products of one head, and the workspace that its threads reuse for the next.
template <class G, class T>
struct Head {
  std::int64_t length, width, stride;
  T scale;
  bool causal;
  Buffer<T> left, right, p, ds, r, z;

  template <class Task>
  explicit Head(const Task& task)
      : length(task.length),
        width(task.width),
        stride((length + G::WIDTH - 1) / G::WIDTH * G::WIDTH),
        scale(task.scale),
        causal(task.causal),
        left(make_buffer<T>(G::packed(length, std::max(length, width), G::TALL))),
        right(make_buffer<T>(G::packed(std::max(length, width), std::max(length, width), G::WIDTH))),
        p(make_buffer<T>(length * stride)),
        ds(make_buffer<T>(length * stride)),
        r(make_buffer<T>(length * stride)),
        z(make_buffer<T>(length * stride)) {}

  std::int64_t seen(std::int64_t row) const { return causal ? row + 1 : length; }

  // scores (+)= alpha a b^T for a, b [length, width]
  FASTREG_INLINE void pairs(const Rows<T>& a, const Rows<T>& b, T alpha, bool add, T* scores) {
    G::template pack_columns<G::TALL>(a.data, a.stride, length, width, left.get());
    G::template pack_columns<G::WIDTH>(b.data, b.stride, length, width, right.get());
    G::multiply({left.get(), right.get(), length, length, width, scores, stride, alpha, add,
                 causal ? Band::kLower : Band::kFull});
  }

  // out (+)= alpha weights x for weights [length, length], x [length, width]
  FASTREG_INLINE void weigh(const T* weights, const Rows<T>& x, T alpha, bool add, T* out) {
    G::template pack_columns<G::TALL>(weights, stride, length, length, left.get());
    G::template pack_rows<G::WIDTH>(x.data, x.stride, width, length, right.get());
    G::multiply({left.get(), right.get(), length, width, length, out, width, alpha, add,
                 causal ? Band::kDepthTo : Band::kFull});
  }

  // out (+)= alpha weights^T x
  FASTREG_INLINE void gather(const T* weights, const Rows<T>& x, T alpha, bool add, T* out) {
    G::template pack_rows<G::TALL>(weights, stride, length, length, left.get());
    G::template pack_rows<G::WIDTH>(x.data, x.stride, width, length, right.get());
    G::multiply({left.get(), right.get(), length, width, length, out, width, alpha, add,
                 causal ? Band::kDepthFrom : Band::kFull});
  }

  static FASTREG_INLINE T row_dot(const T* a, const T* b, std::int64_t n) {
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (std::int64_t j = 0; j < n; ++j) total += a[j] * b[j];
    return total;
  }

  FASTREG_INLINE void clear_rest(T* row, std::int64_t from) const {
    for (std::int64_t j = from; j < stride; ++j) row[j] = 0;
  }

  // p = P, ds = dS
  template <class Task>
  FASTREG_INLINE void softmax_and_gradient(const Task& t, std::int64_t head) {
    pairs(t.q[head], t.k[head], scale, false, p.get());
    pairs(t.d[head], t.v[head], 1, false, ds.get());
    const T* lse = t.lse + head * length;
    for (std::int64_t i = 0; i < length; ++i) {
      const std::int64_t n = seen(i);
      T* __restrict__ weights = p.get() + i * stride;
      T* __restrict__ gradient = ds.get() + i * stride;
      const T offset = lse[i];
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) weights[j] = exp_nonpositive(weights[j] - offset);
      const T delta = row_dot(weights, gradient, n);
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) gradient[j] = weights[j] * (gradient[j] - delta);
      clear_rest(weights, n);
      clear_rest(gradient, n);
    }
  }

  // r = P R, z = Z, from r = R before its row sums are taken off and z = D vV^T
  FASTREG_INLINE void tangents() {
    for (std::int64_t i = 0; i < length; ++i) {
      const std::int64_t n = seen(i);
      const T* __restrict__ weights = p.get() + i * stride;
      const T* __restrict__ gradient = ds.get() + i * stride;
      T* __restrict__ tangent = r.get() + i * stride;
      T* __restrict__ out = z.get() + i * stride;
      const T rho = row_dot(weights, tangent, n);
      T total = 0;
#pragma omp simd reduction(+ : total)
      for (std::int64_t j = 0; j < n; ++j) {
        const T centred = tangent[j] - rho;
        tangent[j] = weights[j] * centred;
        out[j] = weights[j] * out[j] + gradient[j] * centred;
        total += out[j];
      }
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) out[j] -= weights[j] * total;
      clear_rest(tangent, n);
      clear_rest(out, n);
    }
  }

  FASTREG_INLINE void run(const AttentionBackward<T>& t, std::int64_t head) {
    const std::int64_t at = head * length * width;
    softmax_and_gradient(t, head);
    weigh(ds.get(), t.k[head], scale, false, t.dq + at);
    gather(ds.get(), t.q[head], scale, false, t.dk + at);
    gather(p.get(), t.d[head], 1, false, t.dv + at);
  }

  FASTREG_INLINE void run(const AttentionDoubleBackward<T>& t, std::int64_t head) {
    const std::int64_t at = head * length * width;
    softmax_and_gradient(t, head);
    pairs(t.vq[head], t.k[head], scale, false, r.get());
    pairs(t.q[head], t.vk[head], scale, true, r.get());
    pairs(t.d[head], t.vv[head], 1, false, z.get());
    tangents();
    weigh(p.get(), t.vv[head], 1, false, t.grad_d + at);
    weigh(r.get(), t.v[head], 1, true, t.grad_d + at);
    gather(r.get(), t.d[head], 1, false, t.grad_v + at);
    weigh(z.get(), t.k[head], scale, false, t.grad_q + at);
    weigh(ds.get(), t.vk[head], scale, true, t.grad_q + at);
    gather(z.get(), t.q[head], scale, false, t.grad_k + at);
    gather(ds.get(), t.vq[head], scale, true, t.grad_k + at);
  }
};

struct Heads {
  template <class G, class Task>
  static FASTREG_INLINE void run(const Task& task, std::int64_t begin, std::int64_t end) {
    using T = std::remove_const_t<decltype(task.scale)>;
    Head<G, T> head(task);
    for (std::int64_t i = begin; i < end; ++i) head.run(task, i);
  }
};

template <class T, class Task>
void run_all(const Task& task) {
  const auto run = PerIsa<T, Heads, const Task&, std::int64_t, std::int64_t>::best();
  const int threads = threads_for(task.heads() * task.length * task.length * task.width / 8, task.threads);
  const std::int64_t grain = std::max<std::int64_t>(1, task.heads() / (4 * threads));
  parallel_chunks(task.heads(), grain, threads,
                  [&](std::int64_t begin, std::int64_t end) { run(task, begin, end); });
}

}  // namespace

template <class T>
void attention_backward(const AttentionBackward<T>& p) {
  run_all<T>(p);
}
template <class T>
void attention_double_backward(const AttentionDoubleBackward<T>& p) {
  run_all<T>(p);
}

template void attention_backward(const AttentionBackward<float>&);
template void attention_backward(const AttentionBackward<double>&);
template void attention_double_backward(const AttentionDoubleBackward<float>&);
template void attention_double_backward(const AttentionDoubleBackward<double>&);

}  // namespace fastreg
