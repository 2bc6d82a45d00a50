// mirai::foresight_cosine on the GPU.  One warp a row of `projected`: the row and its target row are loaded once, with
// 16-byte loads, and held in registers; three sums go around the warp; the gradient is written from the registers.
// The grid stays on the device and walks over the rows.  Every warp keeps to one head and leaves one sum, which a
// second, tiny kernel adds in a fixed order: no atomics, the same bits in every run.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>

#include "launch.h"

namespace mirai {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int kVector = 8;  // elements of a chunk: 16 bytes of a 16-bit type, twice 16 of fp32
constexpr double kEps = 1e-12;

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  return static_cast<T>(value);
}

// kVector elements as they lie in memory.
template <typename T>
struct Chunk {
  uint4 raw[sizeof(T) * kVector / sizeof(uint4)];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (uint4& part : raw) part = make_uint4(0, 0, 0, 0);
  }

  template <bool kStreaming>
  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(raw) / sizeof(uint4)); ++i) {
      const uint4* place = reinterpret_cast<const uint4*>(from) + i;
      raw[i] = kStreaming ? __ldcs(place) : __ldg(place);
    }
  }

  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(raw) / sizeof(uint4)); ++i) {
      __stcs(reinterpret_cast<uint4*>(to) + i, raw[i]);
    }
  }

  __device__ __forceinline__ float get(int i) const {
    return to_float(reinterpret_cast<const T*>(raw)[i]);
  }
  __device__ __forceinline__ void set(int i, float value) {
    reinterpret_cast<T*>(raw)[i] = from_float<T>(value);
  }
};

// What a lane has of the three sums of a row.
struct Products {
  float states_states = 0.f, states_target = 0.f, target_target = 0.f;

  __device__ __forceinline__ void add(float p, float t) {
    states_states = fmaf(p, p, states_states);
    states_target = fmaf(p, t, states_target);
    target_target = fmaf(t, t, target_target);
  }
};

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;  // the same bits in every lane
}

// gradient = along_target * target - along_states * states
struct Row {
  double cosine;
  float along_target, along_states;
};

// The few operations a row that follow its sums, in fp64: with them a row's error is that of its products alone.
__device__ __forceinline__ Row finish_row(const Products& lane, double scale) {
  const double ss = warp_sum(lane.states_states), st = warp_sum(lane.states_target);
  const double tt = warp_sum(lane.target_target);
  // F.normalize's clamp, squared; a NaN fails the comparison and stays.  A clamped norm carries no gradient.
  constexpr double kSmallest = kEps * kEps;
  const double p = ss < kSmallest ? kSmallest : ss, t = tt < kSmallest ? kSmallest : tt;
  const double inverse = rsqrt(p * t);
  Row row;
  row.cosine = st * inverse;
  row.along_target = static_cast<float>(scale * inverse);
  row.along_states = ss < kSmallest ? 0.f : static_cast<float>(scale * row.cosine / p);
  return row;
}

// Chunks of a row that a lane owns: lane, lane + 32, ...  kChunks of them stay in registers; with kChunks == 0 (rows
// too wide for that) they are read again, from cache.
template <typename P, typename T, typename G, int kChunks>
__device__ __forceinline__ double vector_row(const P* states, const T* target, G* gradient, double scale, int width,
                                             int lane) {
  Products sums;
  if constexpr (kChunks > 0) {
    Chunk<P> p[kChunks];
    Chunk<T> t[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int start = (lane + i * kWarp) * kVector;
      if (start < width) {
        p[i].template load<true>(states + start);
        t[i].template load<false>(target + start);
      } else {
        p[i].clear();
        t[i].clear();
      }
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums.add(p[i].get(j), t[i].get(j));
    }
    const Row row = finish_row(sums, scale);
    if (gradient != nullptr) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int start = (lane + i * kWarp) * kVector;
        Chunk<G> g;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          g.set(j, row.along_target * t[i].get(j) - row.along_states * p[i].get(j));
        }
        if (start < width) g.store(gradient + start);
      }
    }
    return row.cosine;
  } else {
    Chunk<P> p;
    Chunk<T> t;
    for (int start = lane * kVector; start < width; start += kWarp * kVector) {
      p.template load<false>(states + start);
      t.template load<false>(target + start);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums.add(p.get(j), t.get(j));
    }
    const Row row = finish_row(sums, scale);
    if (gradient != nullptr) {
      for (int start = lane * kVector; start < width; start += kWarp * kVector) {
        p.template load<false>(states + start);
        t.template load<false>(target + start);
        Chunk<G> g;
#pragma unroll
        for (int j = 0; j < kVector; ++j) g.set(j, row.along_target * t.get(j) - row.along_states * p.get(j));
        g.store(gradient + start);
      }
    }
    return row.cosine;
  }
}

// Rows of odd width or address: one element a load.
template <typename P, typename T, typename G>
__device__ __forceinline__ double scalar_row(const P* states, const T* target, G* gradient, double scale, int width,
                                             int lane) {
  Products sums;
  for (int c = lane; c < width; c += kWarp) sums.add(to_float(states[c]), to_float(target[c]));
  const Row row = finish_row(sums, scale);
  if (gradient != nullptr) {
    for (int c = lane; c < width; c += kWarp) {
      gradient[c] = from_float<G>(row.along_target * to_float(target[c]) - row.along_states * to_float(states[c]));
    }
  }
  return row.cosine;
}

constexpr int kScalar = -1;  // in place of a number of chunks

template <typename P>
struct GradientOf {
  using type = P;
};
template <>
struct GradientOf<__half> {
  using type = float;  // as arguments.h says
};

template <typename P, typename T, int kChunks>
__global__ void __launch_bounds__(kThreads, 2)
    foresight_cosine_kernel(const __grid_constant__ Problem problem, double* __restrict__ parts) {
  using G = typename GradientOf<P>::type;
  const int lane = threadIdx.x % kWarp, heads = problem.num_heads, width = static_cast<int>(problem.width);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  // Neighbouring warps take the heads of one slot, whose targets are close to each other.
  const int64_t teams = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock / heads;
  const int k = static_cast<int>(warp % heads);
  const int64_t total = problem.batch * problem.slots;
  double sum = 0.0;
  if (warp < teams * heads) {
    const Head& head = problem.heads[k];
    const double divisor = static_cast<double>(problem.counts[k]) * static_cast<double>(problem.batch);
    const double scale = -static_cast<double>(problem.share) * problem.weights[k] / divisor * problem.upstream;
    for (int64_t i = warp / heads; i < total; i += teams) {
      const int64_t b = i / problem.slots, s = i - b * problem.slots;
      const int64_t row = problem.index[s * heads + k];
      assert(row >= -1 && row < problem.rows && "mirai::foresight_cosine: index out of range");
      G* gradient = head.gradient == nullptr ? nullptr : static_cast<G*>(head.gradient) + i * head.gradient_stride;
      if (row < 0) {
        if (gradient != nullptr) {
          for (int c = lane; c < width; c += kWarp) gradient[c] = from_float<G>(0.f);
        }
        continue;
      }
      const P* states = static_cast<const P*>(head.states) + b * head.batch_stride + s * head.slot_stride;
      const T* target = static_cast<const T*>(problem.target) + (b * problem.rows + row) * problem.width;
      if constexpr (kChunks == kScalar) {
        sum += scalar_row<P, T, G>(states, target, gradient, scale, width, lane);
      } else {
        sum += vector_row<P, T, G, kChunks>(states, target, gradient, scale, width, lane);
      }
    }
  }
  if (lane == 0) parts[warp] = sum;
}

// One block: the sum over all warps of each head, in the same order every time, then the two results.
__global__ void __launch_bounds__(kThreads) finish_kernel(const double* __restrict__ parts, int64_t part_count, int heads,
                                                          const float* __restrict__ weights,
                                                          const float* __restrict__ counts, int64_t batch, float share,
                                                          float* __restrict__ loss, float* __restrict__ cosine) {
  __shared__ double shared[kWarpsPerBlock];
  double total = 0.0;
  for (int k = 0; k < heads; ++k) {
    double sum = 0.0;
    for (int64_t i = k + static_cast<int64_t>(threadIdx.x) * heads; i < part_count; i += kThreads * heads) sum += parts[i];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      double all = 0.0;
#pragma unroll
      for (int w = 0; w < kWarpsPerBlock; ++w) all += shared[w];
      const double mean = all / (static_cast<double>(counts[k]) * static_cast<double>(batch));
      cosine[k] = static_cast<float>(mean);
      total -= static_cast<double>(share) * weights[k] * mean;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *loss = static_cast<float>(total);
}

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) rescale_kernel(const From* from, To* to, int64_t count,
                                                           const float* __restrict__ received, float expected) {
  if (static_cast<const void*>(from) == static_cast<const void*>(to) && *received == expected) return;
  const float ratio = static_cast<float>(static_cast<double>(*received) / expected);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    to[i] = from_float<To>(to_float(from[i]) * ratio);
  }
}

using Kernel = void (*)(Problem, double*);

template <typename P, typename T>
Kernel kernel_for(int chunks) {
  switch (chunks) {
    case kScalar: return foresight_cosine_kernel<P, T, kScalar>;
    case 3: return foresight_cosine_kernel<P, T, 3>;  // up to 768: GPT-B, DINOv2-B
    case 4: return foresight_cosine_kernel<P, T, 4>;  // 1024: GPT-L, DINOv2-L
    case 5: return foresight_cosine_kernel<P, T, 5>;  // 1280: GPT-XL; a sixth would spill
    default: return foresight_cosine_kernel<P, T, 0>;
  }
}

template <typename P>
Kernel kernel_for(Type target, int chunks) {
  switch (target) {
    case Type::kFloat: return kernel_for<P, float>(chunks);
    case Type::kBFloat16: return kernel_for<P, __nv_bfloat16>(chunks);
    default: return kernel_for<P, __half>(chunks);
  }
}

int64_t size_of(Type type) {
  return type == Type::kFloat ? 4 : 2;
}

bool aligned(const void* address, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0 && stride * size % sizeof(uint4) == 0;
}

// Chunks a lane holds, 0 where there are too many, kScalar where some row does not begin on 16 bytes.
int chunks_of(const Problem& problem, Type states, Type target) {
  if (problem.width % kVector != 0 || !aligned(problem.target, problem.width, size_of(target))) return kScalar;
  const int64_t gradient_size = states == Type::kHalf ? 4 : size_of(states);
  for (int k = 0; k < problem.num_heads; ++k) {
    const Head& head = problem.heads[k];
    if (!aligned(head.states, head.batch_stride, size_of(states)) ||
        !aligned(head.states, head.slot_stride, size_of(states)) ||
        !aligned(head.gradient, head.gradient_stride, gradient_size)) {
      return kScalar;
    }
  }
  const int64_t chunks = (problem.width + kWarp * kVector - 1) / (kWarp * kVector);
  return chunks > 5 ? 0 : static_cast<int>(chunks < 3 ? 3 : chunks);
}

Kernel choose_kernel(const Problem& problem, Type states, Type target) {
  const int chunks = chunks_of(problem, states, target);
  switch (states) {
    case Type::kFloat: return kernel_for<float>(target, chunks);
    case Type::kBFloat16: return kernel_for<__nv_bfloat16>(target, chunks);
    default: return kernel_for<__half>(target, chunks);
  }
}

cudaError_t blocks_on_device(const void* kernel, int64_t* blocks) {
  int device = 0, processors = 0, each = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
  *blocks = static_cast<int64_t>(processors) * each;
  return status;
}

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <typename From, typename To>
cudaError_t rescale_with(const void* from, void* to, int64_t count, const float* received, float expected,
                         cudaStream_t stream) {
  int64_t blocks = 0;
  const cudaError_t status = blocks_on_device(reinterpret_cast<const void*>(rescale_kernel<From, To>), &blocks);
  if (status != cudaSuccess || count == 0) return status;
  rescale_kernel<From, To><<<static_cast<unsigned>(at_most(blocks, divide_up(count, kThreads))), kThreads, 0, stream>>>(
      static_cast<const From*>(from), static_cast<To*>(to), count, received, expected);
  return cudaGetLastError();
}

template <typename From>
cudaError_t rescale_from(const void* from, void* to, Type to_type, int64_t count, const float* received, float expected,
                         cudaStream_t stream) {
  switch (to_type) {
    case Type::kFloat: return rescale_with<From, float>(from, to, count, received, expected, stream);
    case Type::kBFloat16: return rescale_with<From, __nv_bfloat16>(from, to, count, received, expected, stream);
    default: return rescale_with<From, __half>(from, to, count, received, expected, stream);
  }
}

}  // namespace

cudaError_t count_parts(const Problem& problem, Type states, Type target, int64_t* part_count) {
  int64_t blocks = 0;
  const auto kernel = reinterpret_cast<const void*>(choose_kernel(problem, states, target));
  const cudaError_t status = blocks_on_device(kernel, &blocks);
  const int64_t rows = problem.batch * problem.slots * problem.num_heads;
  const int64_t fewest = divide_up(problem.num_heads, kWarpsPerBlock);  // at least one warp a head
  blocks = at_most(blocks, divide_up(rows, kWarpsPerBlock));
  *part_count = (blocks < fewest ? fewest : blocks) * kWarpsPerBlock;
  return status;
}

cudaError_t launch_foresight_cosine(const Problem& problem, Type states, Type target, const Results& results,
                                    int64_t part_count, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(part_count / kWarpsPerBlock);
  choose_kernel(problem, states, target)<<<blocks, kThreads, 0, stream>>>(problem, results.parts);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  const int64_t used = part_count / problem.num_heads * problem.num_heads;
  finish_kernel<<<1, kThreads, 0, stream>>>(results.parts, used, problem.num_heads, problem.weights, problem.counts,
                                            problem.batch, problem.share, results.loss, results.cosine);
  return cudaGetLastError();
}

cudaError_t launch_rescale(const void* from, Type from_type, void* to, Type to_type, int64_t count,
                           const float* received, float expected, cudaStream_t stream) {
  switch (from_type) {
    case Type::kFloat: return rescale_from<float>(from, to, to_type, count, received, expected, stream);
    case Type::kBFloat16: return rescale_from<__nv_bfloat16>(from, to, to_type, count, received, expected, stream);
    default: return rescale_from<__half>(from, to, to_type, count, received, expected, stream);
  }
}

}  // namespace mirai
