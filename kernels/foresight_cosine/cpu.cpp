// mirai::foresight_cosine on the CPU: each row of `projected` is read once from memory, dotted with its target row
// (which stays in cache: K heads and neighbouring slots share it) and answered with its gradient.
// fp32 arithmetic in vector registers, fp64 sums over rows; results do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>  // with the conversions between fp32 and the narrow types
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "arguments.h"

namespace mirai {
namespace {

using at::vec::Vectorized;
using Floats = Vectorized<float>;
constexpr int64_t kLanes = Floats::size();
// Slots whose cosines are summed together: fixed, so that the order of summation is; few enough that their targets stay
// in cache from head to head.
constexpr int64_t kSlotsPerPart = 32;

// Bytes of gradient from which on it is written past the cache.
constexpr int64_t kBeyondCache = int64_t{16} << 20;

// Two vectors of fp32 from 2 * kLanes consecutive elements.
template <typename T>
inline std::pair<Floats, Floats> load_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Floats::loadu(from), Floats::loadu(from + kLanes)};
  } else {
    const auto [low, high] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(from));
    return {low, high};
  }
}

// Past the cache, where the processor can: a gradient that does not fit there would first be read for nothing.
inline bool can_stream(const void* to) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return reinterpret_cast<uintptr_t>(to) % sizeof(Floats) == 0;
#else
  return false;
#endif
}

inline void stream(float* to, Floats values) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_ps(to, values);
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_ps(to, values);
#else
  values.store(to);
#endif
}

inline void streams_done() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();  // before other threads read what was streamed
#endif
}

template <typename T>
inline void store_pair(T* to, Floats low, Floats high) {
  if constexpr (std::is_same_v<T, float>) {
    low.store(to);
    high.store(to + kLanes);
  } else {
    at::vec::convert_from_float<T>(low, high).store(to);
  }
}

// Sums over a row; the few operations a row that follow are done in fp64, where they cost nothing.
struct Products {
  double states_states, states_target, target_target;
};

// F.normalize's divisor, NaN included, and whether the norm itself carries a gradient (clamp_min's rule).
struct Norm {
  double size;
  bool free;
};

inline Norm clamped_norm(double sum_of_squares) {
  const double norm = std::sqrt(sum_of_squares);
  return {norm < kEps ? kEps : norm, !(norm < kEps)};
}

inline double total(Floats first, Floats second) {
  float lanes[2 * kLanes];
  first.store(lanes);
  second.store(lanes + kLanes);
  double sums[8] = {};  // independent, so that the compiler adds them side by side
  for (int64_t i = 0; i < 2 * kLanes; i += 8) {
    for (int64_t j = 0; j < 8; ++j) sums[j] += lanes[i + j];
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <typename P, typename T>
inline Products products(const P* states, const T* target, int64_t width) {
  Floats ss0(0.f), ss1(0.f), st0(0.f), st1(0.f), tt0(0.f), tt1(0.f);
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
    const auto [p0, p1] = load_pair(states + c);
    const auto [t0, t1] = load_pair(target + c);
    ss0 = at::vec::fmadd(p0, p0, ss0);
    ss1 = at::vec::fmadd(p1, p1, ss1);
    st0 = at::vec::fmadd(p0, t0, st0);
    st1 = at::vec::fmadd(p1, t1, st1);
    tt0 = at::vec::fmadd(t0, t0, tt0);
    tt1 = at::vec::fmadd(t1, t1, tt1);
  }
  Products sums{total(ss0, ss1), total(st0, st1), total(tt0, tt1)};
  for (; c < width; ++c) {
    const double p = static_cast<float>(states[c]), t = static_cast<float>(target[c]);
    sums.states_states += p * p;
    sums.states_target += p * t;
    sums.target_target += t * t;
  }
  return sums;
}

// gradient = along_target * target - along_states * states
template <typename P, typename T, typename G>
inline void write_gradient(G* gradient, const P* states, const T* target, float along_target, float along_states,
                           int64_t width, bool past_cache) {
  const Floats a(along_target), b(-along_states);
  int64_t c = 0;
  if constexpr (std::is_same_v<G, float>) {
    for (past_cache = past_cache && can_stream(gradient); past_cache && c + 2 * kLanes <= width; c += 2 * kLanes) {
      const auto [p0, p1] = load_pair(states + c);
      const auto [t0, t1] = load_pair(target + c);
      stream(gradient + c, at::vec::fmadd(a, t0, b * p0));
      stream(gradient + c + kLanes, at::vec::fmadd(a, t1, b * p1));
    }
  }
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
    const auto [p0, p1] = load_pair(states + c);
    const auto [t0, t1] = load_pair(target + c);
    store_pair(gradient + c, at::vec::fmadd(a, t0, b * p0), at::vec::fmadd(a, t1, b * p1));
  }
  for (; c < width; ++c) {
    gradient[c] = static_cast<G>(along_target * static_cast<float>(target[c]) -
                                 along_states * static_cast<float>(states[c]));
  }
}

// One row: returns its cosine and, where `gradient` is wanted, writes scale * d cosine / d states.
template <typename P, typename T, typename G>
inline double one_row(const P* states, const T* target, G* gradient, double scale, int64_t width, bool past_cache) {
  const Products sums = products(states, target, width);
  const Norm p = clamped_norm(sums.states_states), t = clamped_norm(sums.target_target);
  const double cosine = sums.states_target / p.size / t.size;
  if (gradient != nullptr) {
    const double along_states = p.free ? scale * cosine / p.size / p.size : 0.0;
    write_gradient(gradient, states, target, static_cast<float>(scale / p.size / t.size),
                   static_cast<float>(along_states), width, past_cache);
  }
  return cosine;
}

void check_index(const at::Tensor& index, int64_t rows) {
  const int32_t* values = index.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= -1 && values[i] < rows, "index reaches ", values[i], ", target has ", rows,
                      " rows (and -1 for none)");
  }
}

// Sums of cosines, one row of `parts` for kSlotsPerPart slots of the flattened (batch, slot).
template <typename P, typename T, typename G>
void all_rows(const Arguments& a, const std::vector<double>& scales, std::vector<double>& parts) {
  const int64_t heads = a.num_heads(), total = a.batch * a.slots;
  const int32_t* index = a.index.const_data_ptr<int32_t>();
  const T* target = a.target.const_data_ptr<T>();
  const int64_t num_parts = (total + kSlotsPerPart - 1) / kSlotsPerPart;
  const bool past_cache = total * heads * a.width * static_cast<int64_t>(sizeof(G)) >= kBeyondCache;
  at::parallel_for(0, num_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      double* sums = parts.data() + part * heads;
      const int64_t last = std::min(total, (part + 1) * kSlotsPerPart);
      for (int64_t k = 0; k < heads; ++k) {  // outside: one stream read and one written at a time
        const Head& head = a.heads[k];
        for (int64_t i = part * kSlotsPerPart; i < last; ++i) {
          const int64_t b = i / a.slots, s = i % a.slots;
          G* to = head.gradient ? static_cast<G*>(head.gradient) + i * head.gradient_stride : nullptr;
          const int64_t row = index[s * heads + k];
          if (row < 0) {
            if (to != nullptr) std::fill_n(to, a.width, static_cast<G>(0.f));
            continue;
          }
          const P* states = static_cast<const P*>(head.states) + b * head.batch_stride + s * head.slot_stride;
          sums[k] += one_row(states, target + (b * a.rows + row) * a.width, to, scales[k], a.width,
                             past_cache);
        }
      }
    }
    streams_done();
  });
}

#define MIRAI_FLOATS(TYPE, NAME, ...) \
  AT_DISPATCH_SWITCH(TYPE, NAME,      \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

Outputs foresight_cosine(at::TensorList projected, const at::Tensor& target, const at::Tensor& index,
                         const at::Tensor& weights, const at::Tensor& counts, bool mean, double upstream,
                         bool with_gradient, bool /*overwrite: autograd's affair*/) {
  const Arguments a = read_arguments(projected, target, index, weights, counts, with_gradient);
  check_index(a.index, a.rows);
  const int64_t heads = a.num_heads();
  const double share = mean ? 1.0 / static_cast<double>(heads) : 1.0;
  std::vector<double> divisors(heads), scales(heads);
  for (int64_t k = 0; k < heads; ++k) {
    divisors[k] = static_cast<double>(a.counts.const_data_ptr<float>()[k]) * static_cast<double>(a.batch);
    scales[k] = -share * a.weights.const_data_ptr<float>()[k] / divisors[k] * upstream;
  }
  const int64_t num_parts = (a.batch * a.slots + kSlotsPerPart - 1) / kSlotsPerPart;
  std::vector<double> parts(num_parts * heads, 0.0);
  MIRAI_FLOATS(projected[0].scalar_type(), "foresight_cosine", [&] {
    using states_t = scalar_t;
    using gradient_t = std::conditional_t<std::is_same_v<states_t, at::Half>, float, states_t>;
    MIRAI_FLOATS(target.scalar_type(), "foresight_cosine",
                 [&] { all_rows<states_t, scalar_t, gradient_t>(a, scales, parts); });
  });
  double loss = 0.0;
  for (int64_t k = 0; k < heads; ++k) {
    double sum = 0.0;
    for (int64_t part = 0; part < num_parts; ++part) sum += parts[part * heads + k];
    const double cosine = sum / divisors[k];
    a.cosine.mutable_data_ptr<float>()[k] = static_cast<float>(cosine);
    loss -= share * a.weights.const_data_ptr<float>()[k] * cosine;
  }
  *a.loss.mutable_data_ptr<float>() = static_cast<float>(loss);
  return a.outputs();
}

template <typename From, typename To>
void scale_all(const at::Tensor& from, const at::Tensor& to, float ratio) {
  const From* source = from.const_data_ptr<From>();
  To* sink = to.mutable_data_ptr<To>();
  at::parallel_for(0, from.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sink[i] = static_cast<To>(static_cast<float>(source[i]) * ratio);
  });
}

float ratio_of(const at::Tensor& received, double expected) {
  return static_cast<float>(static_cast<double>(received.item<float>()) / static_cast<float>(expected));
}

// gradient * received / expected, in place; nothing when the two are equal.
void rescale_(at::TensorList gradients, const at::Tensor& received, double expected) {
  if (received.item<float>() == static_cast<float>(expected)) return;
  const float ratio = ratio_of(received, expected);
  for (const at::Tensor& gradient : gradients) {
    TORCH_CHECK_VALUE(gradient.is_contiguous(), "gradients: must be contiguous");
    MIRAI_FLOATS(gradient.scalar_type(), "foresight_cosine_rescale_",
                 [&] { scale_all<scalar_t, scalar_t>(gradient, gradient, ratio); });
  }
}

// The same into new tensors, of another or the same dtype.
std::vector<at::Tensor> rescale(at::TensorList gradients, const at::Tensor& received, double expected,
                                at::ScalarType dtype) {
  const float ratio = ratio_of(received, expected);
  std::vector<at::Tensor> out;
  for (const at::Tensor& given : gradients) {
    const at::Tensor gradient = given.contiguous();
    out.push_back(at::empty(gradient.sizes(), gradient.options().dtype(dtype)));
    MIRAI_FLOATS(gradient.scalar_type(), "foresight_cosine_rescale", [&] {
      using from_t = scalar_t;
      MIRAI_FLOATS(dtype, "foresight_cosine_rescale",
                   [&] { scale_all<from_t, scalar_t>(gradient, out.back(), ratio); });
    });
  }
  return out;
}

}  // namespace
}  // namespace mirai

TORCH_LIBRARY_IMPL(mirai, CPU, m) {
  m.impl("foresight_cosine", &mirai::foresight_cosine);
  m.impl("foresight_cosine_rescale_", &mirai::rescale_);
  m.impl("foresight_cosine_rescale", &mirai::rescale);
}
