// Between cuda.cu, which knows no torch, and cuda_op.cpp, which knows no device code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "head.h"

namespace mirai {

constexpr int kMaxHeads = 64;  // what fits into a kernel's parameters

enum class Type { kFloat, kBFloat16, kHalf };

struct Problem {
  Head heads[kMaxHeads];
  const void* target;    // (batch, rows, width)
  const int32_t* index;  // (slots, num_heads)
  const float* weights;
  const float* counts;
  int64_t batch, slots, rows, width;
  int num_heads;
  float share;     // 1, or 1 / num_heads for the mean
  float upstream;  // the gradient that the loss is expected to receive
};

struct Results {
  double* parts;  // one sum of cosines a warp: `part_count` of them
  float* loss;
  float* cosine;
};

// Number of warps that `launch_foresight_cosine` will use on the current device, in *part_count.
cudaError_t count_parts(const Problem& problem, Type states, Type target, int64_t* part_count);
cudaError_t launch_foresight_cosine(const Problem& problem, Type states, Type target, const Results& results,
                                    int64_t part_count, cudaStream_t stream);

// to = from * *received / expected.  In place (`to` == `from`, one type) nothing is touched when the two are equal.
cudaError_t launch_rescale(const void* from, Type from_type, void* to, Type to_type, int64_t count,
                           const float* received, float expected, cudaStream_t stream);

}  // namespace mirai
