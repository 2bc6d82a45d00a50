// Stands in for CUDA's runtime when cuda.cu is compiled as C++: threads of a block are coroutines that take turns at
// every shuffle and barrier, blocks run one after the other.  It shows what the kernels compute and what they touch,
// nothing about speed or races between blocks.
#pragma once

#include <ucontext.h>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 16;

struct uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "";
}

struct Position {
  unsigned x;
};
inline Position threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

namespace emulator {

inline int processors = 2, blocks_each = 1;  // a small device, so that the grid has to walk

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Thread>* threads;
inline std::function<void()> body;
inline double exchange[2][1024];  // what each thread hands over; two, so that a fast one cannot overwrite
inline unsigned turn[1024];

inline void run_body() {
  body();
  (*threads)[threadIdx.x].done = true;
}

inline void let_others_run() {
  const unsigned self = threadIdx.x;
  swapcontext(&(*threads)[self].context, &scheduler);
  threadIdx.x = self;
}

// All threads of the block get here before any goes on.
inline unsigned arrived = 0, generation = 0;

inline void barrier() {
  const unsigned mine = generation;
  if (++arrived == blockDim.x) {
    arrived = 0;
    ++generation;
  }
  while (generation == mine) let_others_run();
}

inline double shuffle_xor(double value, int mask) {
  const unsigned self = threadIdx.x, side = turn[self]++ % 2;
  exchange[side][self] = value;
  let_others_run();
  return exchange[side][self ^ static_cast<unsigned>(mask)];
}

template <typename Launch>
void launch(unsigned blocks, unsigned threads_per_block, Launch kernel) {
  gridDim.x = blocks;
  blockDim.x = threads_per_block;
  body = kernel;
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    std::vector<Thread> all(threads_per_block);
    threads = &all;
    std::memset(turn, 0, sizeof(turn));
    for (Thread& thread : all) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = 1 << 16;
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, run_body, 0);
    }
    for (bool running = true; running;) {
      running = false;
      for (unsigned i = 0; i < threads_per_block; ++i) {
        if (all[i].done) continue;
        running = true;
        threadIdx.x = i;
        swapcontext(&scheduler, &all[i].context);
      }
    }
  }
}

}  // namespace emulator

// The lanes of a warp take the same branches and get one turn each a round, which keeps a warp in step with itself.
inline double __shfl_xor_sync(unsigned, double value, int mask) {
  return emulator::shuffle_xor(value, mask);
}
inline void __syncthreads() {
  emulator::barrier();
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
inline double rsqrt(double value) {
  return 1.0 / std::sqrt(value);
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = emulator::processors;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, int) {
  *blocks = emulator::blocks_each;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
