// What the CPU and the CUDA version of mirai::foresight_cosine agree on: checks, head layout, outputs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "head.h"

namespace mirai {

// Norms are clamped from below like F.normalize's.
constexpr double kEps = 1e-12;

using Outputs = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;

struct Arguments {
  std::vector<at::Tensor> kept;  // owns the storage that `heads` points to
  std::vector<Head> heads;
  at::Tensor target, index, weights, counts;
  int64_t batch, slots, rows, width;
  at::Tensor loss, cosine;
  std::vector<at::Tensor> gradients;  // shaped like `projected`; empty where none is wanted

  int64_t num_heads() const {
    return static_cast<int64_t>(heads.size());
  }
  Outputs outputs() const {
    return {loss, cosine, gradients};
  }
};

inline bool is_narrow_or_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

inline at::Tensor rows_together(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

// Checks every shape, dtype and device, allocates the outputs.  `index` values are the caller's to check.
inline Arguments read_arguments(at::TensorList projected, const at::Tensor& target, const at::Tensor& index,
                                const at::Tensor& weights, const at::Tensor& counts, bool with_gradient) {
  TORCH_CHECK_VALUE(!projected.empty(), "projected: at least one head is needed");
  const bool stacked = projected[0].dim() == 4;
  TORCH_CHECK_VALUE(!stacked || projected.size() == 1, "projected: one (B, S, K, C) tensor or K of (B, S, C)");
  TORCH_CHECK_VALUE(target.dim() == 3, "target: expected (B, M, C), got ", target.sizes());
  TORCH_CHECK_VALUE(index.dim() == 2, "index: expected (S, K), got ", index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kInt, "index: expected int32, got ", index.scalar_type());
  Arguments a;
  a.batch = target.size(0);
  a.rows = target.size(1);
  a.width = target.size(2);
  a.slots = index.size(0);
  const int64_t heads = stacked ? projected[0].size(2) : static_cast<int64_t>(projected.size());
  TORCH_CHECK_VALUE(index.size(1) == heads, "index: ", heads, " heads need (S, ", heads, "), got ", index.sizes());
  const auto dtype = projected[0].scalar_type();
  TORCH_CHECK_TYPE(is_narrow_or_float(dtype), "projected: float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_TYPE(is_narrow_or_float(target.scalar_type()), "target: float32, bfloat16 or float16, got ",
                   target.scalar_type());
  for (const at::Tensor& constant : {weights, counts}) {
    TORCH_CHECK_VALUE(constant.dim() == 1 && constant.size(0) == heads, "weights and counts: expected (", heads,
                      "), got ", constant.sizes());
    TORCH_CHECK_TYPE(constant.scalar_type() == at::kFloat, "weights and counts: expected float32");
  }
  for (const at::Tensor& tensor : {target, index, weights, counts}) {
    TORCH_CHECK_VALUE(tensor.device() == projected[0].device(), "all tensors must be on ", projected[0].device(),
                      ", found ", tensor.device());
  }
  // fp16's range is too small for an unscaled gradient: it is kept in fp32 until the upstream gradient is known.
  const auto kind = projected[0].options().dtype(dtype == at::kHalf ? at::kFloat : dtype);
  if (with_gradient) {
    for (const at::Tensor& states : projected) a.gradients.push_back(at::empty(states.sizes(), kind));
  }
  const std::vector<int64_t> one_head = {a.batch, a.slots, a.width};
  for (int64_t k = 0; k < heads; ++k) {
    const at::Tensor states = rows_together(stacked ? projected[0].select(2, k) : projected[k]);
    TORCH_CHECK_VALUE(states.sizes() == at::IntArrayRef(one_head), "projected[", k, "]: expected ",
                      at::IntArrayRef(one_head), ", got ", states.sizes());
    TORCH_CHECK_TYPE(states.scalar_type() == dtype, "projected: all heads need one dtype");
    TORCH_CHECK_VALUE(states.device() == projected[0].device(), "projected: all heads must be on one device");
    void* gradient = nullptr;
    if (with_gradient) {
      const at::Tensor& whole = a.gradients[stacked ? 0 : k];
      gradient = static_cast<char*>(whole.mutable_data_ptr()) + (stacked ? k * a.width * whole.element_size() : 0);
    }
    a.kept.push_back(states);
    a.heads.push_back({states.const_data_ptr(), gradient, states.stride(0), states.stride(1),
                       stacked ? heads * a.width : a.width});
  }
  a.target = target.contiguous();
  a.index = index.contiguous();
  a.weights = weights.contiguous();
  a.counts = counts.contiguous();
  const auto wide = projected[0].options().dtype(at::kFloat);
  a.loss = at::empty({}, wide);
  a.cosine = at::empty({heads}, wide);
  return a;
}

}  // namespace mirai
