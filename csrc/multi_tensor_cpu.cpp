// Sums are kept per chunk and added in order, so they do not depend on the number of threads.
#include "multi_tensor_cpu.h"

#include <vector>

#include "machine.h"
#include "parallel.h"

namespace fastreg {
namespace {

template <class Rule, class T>
struct ChunkPass {
  static FASTREG_INLINE double run(const Rule& rule, T* const* lists, std::int64_t size, T coefficient) {
    T* own[Rule::kLists];
    for (int list = 0; list < Rule::kLists; ++list) own[list] = lists[list];
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < size; ++i) {
      T x[Rule::kLists];
#pragma GCC unroll 4
      for (int list = 0; list < Rule::kLists; ++list) x[list] = own[list][i];
      sum += rule(x, coefficient);
#pragma GCC unroll 4
      for (int list = 0; list < Rule::kWritten; ++list) own[list][i] = x[list];
    }
    return sum;
  }
  FASTREG_V4 static double v4(const Rule& r, T* const* x, std::int64_t n, T c) { return run(r, x, n, c); }
  FASTREG_V3 static double v3(const Rule& r, T* const* x, std::int64_t n, T c) { return run(r, x, n, c); }
  static double base(const Rule& r, T* const* x, std::int64_t n, T c) { return run(r, x, n, c); }
};

}  // namespace

template <class Rule, class T>
void multi_tensor(const Rule& rule, const TensorLists& lists, const T* coefficients, T* sums, int threads) {
  using Pass = ChunkPass<Rule, T>;
  const auto pass = for_this_machine(Pass::v4, Pass::v3, Pass::base);
  std::vector<double> partial(lists.count);
  parallel_for(lists.count, threads, [&](std::int64_t number) {
    const Chunk& chunk = lists.chunks[number];
    T* own[Rule::kLists];
    for (int list = 0; list < Rule::kLists; ++list) {
      own[list] = reinterpret_cast<T*>(lists.addresses[list * lists.tensors + chunk.tensor]) + chunk.start;
    }
    partial[number] = pass(rule, own, chunk.size, coefficients ? coefficients[chunk.tensor] : T(0));
  });
  for (std::int64_t tensor = 0; sums && tensor < lists.tensors; ++tensor) {
    double sum = 0;
    for (std::int64_t n = lists.bounds[tensor]; n < lists.bounds[tensor + 1]; ++n) sum += partial[n];
    sums[tensor] = static_cast<T>(sum);
  }
}

#define FASTREG_INSTANTIATE(RULE, T) \
  template void multi_tensor(const RULE<T>&, const TensorLists&, const T*, T*, int);
#define FASTREG_INSTANTIATE_ALL(T)  \
  FASTREG_INSTANTIATE(SqNorm, T)      \
  FASTREG_INSTANTIATE(Dot, T)         \
  FASTREG_INSTANTIATE(Axpy, T)        \
  FASTREG_INSTANTIATE(Sgd, T)         \
  FASTREG_INSTANTIATE(SgdMomentum, T) \
  FASTREG_INSTANTIATE(AdamW, T)
FASTREG_INSTANTIATE_ALL(float)
FASTREG_INSTANTIATE_ALL(double)

}  // namespace fastreg
