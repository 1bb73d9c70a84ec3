#include "multi_tensor_cuda.h"

namespace fastreg {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Vectors of four a thread has in flight per list.
constexpr int kUnroll = 2;

// The sum over a block's threads, in thread 0; the order is fixed.
__device__ float block_sum(float sum) {
  __shared__ float of_warps[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += of_warps[warp];
  }
  return sum;
}

template <class Rule>
__device__ float scalar_step(const Rule& rule, float* const (&lists)[Rule::kLists], std::int64_t i, float coefficient) {
  float x[Rule::kLists];
#pragma unroll
  for (int list = 0; list < Rule::kLists; ++list) x[list] = lists[list][i];
  const float term = rule(x, coefficient);
#pragma unroll
  for (int list = 0; list < Rule::kWritten; ++list) lists[list][i] = x[list];
  return term;
}

// Elements 4 i to 4 i + 3 for kUnroll values of i: all loads are issued before the first one is used.
template <class Rule>
__device__ float vector_step(const Rule& rule, float* const (&lists)[Rule::kLists], std::int64_t first,
                             std::int64_t vectors, float coefficient) {
  float4 loaded[kUnroll][Rule::kLists];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const std::int64_t i = first + u * kThreads;
#pragma unroll
    for (int list = 0; list < Rule::kLists; ++list) {
      loaded[u][list] = i < vectors ? reinterpret_cast<const float4*>(lists[list])[i] : float4{0, 0, 0, 0};
    }
  }
  float sum = 0;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const std::int64_t i = first + u * kThreads;
    if (i >= vectors) break;
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      float x[Rule::kLists];
#pragma unroll
      for (int list = 0; list < Rule::kLists; ++list) x[list] = (&loaded[u][list].x)[lane];
      sum += rule(x, coefficient);
#pragma unroll
      for (int list = 0; list < Rule::kWritten; ++list) (&loaded[u][list].x)[lane] = x[list];
    }
#pragma unroll
    for (int list = 0; list < Rule::kWritten; ++list) reinterpret_cast<float4*>(lists[list])[i] = loaded[u][list];
  }
  return sum;
}

template <class Rule>
__global__ void __launch_bounds__(kThreads)
    multi_tensor_kernel(const Rule rule, const TensorLists all, const float* __restrict__ coefficients /* [tensors] */,
                        float* __restrict__ partial /* [chunks] */) {
  const Chunk chunk = all.chunks[blockIdx.x];
  float* lists[Rule::kLists];
  std::int64_t low_bits = 0;
#pragma unroll
  for (int list = 0; list < Rule::kLists; ++list) {
    const std::int64_t address = all.addresses[list * all.tensors + chunk.tensor];
    lists[list] = reinterpret_cast<float*>(address) + chunk.start;
    low_bits |= reinterpret_cast<std::int64_t>(lists[list]);
  }
  const float coefficient = coefficients ? coefficients[chunk.tensor] : 0.0f;
  const std::int64_t vectors = low_bits % sizeof(float4) == 0 ? chunk.size / 4 : 0;
  float sum = 0;
  for (std::int64_t i = threadIdx.x; i < vectors; i += kUnroll * kThreads) {
    sum += vector_step(rule, lists, i, vectors, coefficient);
  }
  for (std::int64_t i = 4 * vectors + threadIdx.x; i < chunk.size; i += kThreads) {
    sum += scalar_step(rule, lists, i, coefficient);
  }
  if (partial) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  }
}

// One block per tensor adds its chunks' sums.
__global__ void __launch_bounds__(kThreads)
    chunk_sum_kernel(const float* __restrict__ partial /* [chunks] */, const std::int64_t* __restrict__ bounds,
                     float* __restrict__ sums /* [tensors] */) {
  float sum = 0;
  for (std::int64_t n = bounds[blockIdx.x] + threadIdx.x; n < bounds[blockIdx.x + 1]; n += kThreads) sum += partial[n];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace

template <class Rule>
cudaError_t multi_tensor(const Rule& rule, const TensorLists& lists, const float* coefficients, float* partial,
                         float* sums, cudaStream_t stream) {
  if (lists.count > 0) {
    const auto blocks = static_cast<unsigned>(lists.count);
    multi_tensor_kernel<<<blocks, kThreads, 0, stream>>>(rule, lists, coefficients, partial);
  }
  if (sums && lists.tensors > 0) {
    chunk_sum_kernel<<<static_cast<unsigned>(lists.tensors), kThreads, 0, stream>>>(partial, lists.bounds, sums);
  }
  return cudaGetLastError();
}

#define FASTREG_INSTANTIATE(RULE)                                                                                 \
  template cudaError_t multi_tensor(const RULE<float>&, const TensorLists&, const float*, float*, float*, \
                                    cudaStream_t);
FASTREG_INSTANTIATE(SqNorm)
FASTREG_INSTANTIATE(Dot)
FASTREG_INSTANTIATE(Axpy)
FASTREG_INSTANTIATE(Sgd)
FASTREG_INSTANTIATE(SgdMomentum)
FASTREG_INSTANTIATE(AdamW)

}  // namespace fastreg
