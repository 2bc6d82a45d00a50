// mirai::foresight_cosine for CUDA tensors: arguments in, kernels of cuda.cu out, on the current stream.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "arguments.h"
#include "launch.h"

namespace mirai {
namespace {

Type type_of(at::ScalarType type) {
  TORCH_CHECK_TYPE(is_narrow_or_float(type), "expected float32, bfloat16 or float16, got ", type);
  return type == at::kFloat ? Type::kFloat : type == at::kBFloat16 ? Type::kBFloat16 : Type::kHalf;
}

void check(cudaError_t status) {
  TORCH_CHECK(status == cudaSuccess, "mirai::foresight_cosine: ", cudaGetErrorString(status));
}

Outputs foresight_cosine(at::TensorList projected, const at::Tensor& target, const at::Tensor& index,
                         const at::Tensor& weights, const at::Tensor& counts, bool mean, double upstream,
                         bool with_gradient, bool /*overwrite: autograd's affair*/) {
  const c10::cuda::OptionalCUDAGuard guard(target.device());
  const Arguments a = read_arguments(projected, target, index, weights, counts, with_gradient);
  const int64_t heads = a.num_heads();
  TORCH_CHECK_VALUE(heads <= kMaxHeads, "projected: at most ", kMaxHeads, " heads on CUDA, got ", heads);
  TORCH_CHECK_VALUE(a.width < (int64_t{1} << 30), "projected: rows of ", a.width, " elements are too wide");
  Problem problem{};
  std::copy(a.heads.begin(), a.heads.end(), problem.heads);
  problem.target = a.target.const_data_ptr();
  problem.index = a.index.const_data_ptr<int32_t>();
  problem.weights = a.weights.const_data_ptr<float>();
  problem.counts = a.counts.const_data_ptr<float>();
  problem.batch = a.batch;
  problem.slots = a.slots;
  problem.rows = a.rows;
  problem.width = a.width;
  problem.num_heads = static_cast<int>(heads);
  problem.share = mean ? 1.f / static_cast<float>(heads) : 1.f;
  problem.upstream = static_cast<float>(upstream);
  const Type states_type = type_of(projected[0].scalar_type()), target_type = type_of(target.scalar_type());
  int64_t part_count = 0;
  check(count_parts(problem, states_type, target_type, &part_count));
  const at::Tensor parts = at::empty({part_count}, a.target.options().dtype(at::kDouble));
  const Results results{parts.mutable_data_ptr<double>(), a.loss.mutable_data_ptr<float>(),
                        a.cosine.mutable_data_ptr<float>()};
  check(launch_foresight_cosine(problem, states_type, target_type, results, part_count,
                                c10::cuda::getCurrentCUDAStream()));
  return a.outputs();
}

const float* one_float(const at::Tensor& received, const at::Tensor& gradient) {
  TORCH_CHECK_TYPE(received.scalar_type() == at::kFloat && received.numel() == 1, "received: expected one float32");
  TORCH_CHECK_VALUE(received.device() == gradient.device(), "received: must be on ", gradient.device());
  return received.const_data_ptr<float>();
}

void rescale_(at::TensorList gradients, const at::Tensor& received, double expected) {
  const c10::cuda::OptionalCUDAGuard guard(received.device());
  for (const at::Tensor& gradient : gradients) {
    TORCH_CHECK_VALUE(gradient.is_contiguous(), "gradients: must be contiguous");
    const Type type = type_of(gradient.scalar_type());
    void* data = gradient.mutable_data_ptr();
    check(launch_rescale(data, type, data, type, gradient.numel(), one_float(received, gradient),
                         static_cast<float>(expected), c10::cuda::getCurrentCUDAStream()));
  }
}

std::vector<at::Tensor> rescale(at::TensorList gradients, const at::Tensor& received, double expected,
                                at::ScalarType dtype) {
  const c10::cuda::OptionalCUDAGuard guard(received.device());
  std::vector<at::Tensor> out;
  for (const at::Tensor& given : gradients) {
    const at::Tensor gradient = given.contiguous();
    out.push_back(at::empty(gradient.sizes(), gradient.options().dtype(dtype)));
    check(launch_rescale(gradient.const_data_ptr(), type_of(gradient.scalar_type()), out.back().mutable_data_ptr(),
                         type_of(dtype), gradient.numel(), one_float(received, gradient),
                         static_cast<float>(expected), c10::cuda::getCurrentCUDAStream()));
  }
  return out;
}

}  // namespace
}  // namespace mirai

TORCH_LIBRARY_IMPL(mirai, CUDA, m) {
  m.impl("foresight_cosine", &mirai::foresight_cosine);
  m.impl("foresight_cosine_rescale_", &mirai::rescale_);
  m.impl("foresight_cosine_rescale", &mirai::rescale);
}
