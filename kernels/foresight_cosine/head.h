// Where one head's rows lie; without torch or CUDA, for all versions.
#pragma once

#include <cstdint>

namespace mirai {

// projected[b, s] starts at states + b * batch_stride + s * slot_stride, its gradient at
// gradient + (b * slots + s) * gradient_stride (strides in elements; gradient null where none is wanted).
struct Head {
  const void* states;
  void* gradient;
  int64_t batch_stride;
  int64_t slot_stride;
  int64_t gradient_stride;
};

}  // namespace mirai
