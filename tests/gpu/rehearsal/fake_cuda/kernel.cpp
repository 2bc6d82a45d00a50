// Kernels: what nvcc's generated code registers, and launches, which are counted by name.
#include "fake.h"

#include <cstdio>
#include <cstring>
#include <unordered_map>

namespace fake {

// What the <<<...>>> syntax hands from its first generated call to its second.
struct Configuration {
  dim3 grid;
  dim3 block;
  size_t shared;
  void* stream;
};

static thread_local Configuration pushed;

static std::unordered_map<const void*, const char*>& names() {
  static auto* found = new std::unordered_map<const void*, const char*>;
  return *found;
}

// By physical device, whether there is a trace or not.
static std::unordered_map<int, long>& launches() {
  static auto* found = new std::unordered_map<int, long>;
  return *found;
}

const char* kernel_name(const void* function) {
  Lock lock(mutex());
  auto found = names().find(function);
  return found == names().end() ? "?" : found->second;
}

void name_kernel(const void* function, const char* name) {
  Lock lock(mutex());
  names()[function] = name;
}

static bool fits(dim3 grid, dim3 block) {
  bool grid_fits = grid.x > 0 && grid.x <= 2147483647u && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535;
  unsigned long long threads = (unsigned long long)block.x * block.y * block.z;
  return grid_fits && threads > 0 && threads <= 1024 && block.z <= 64;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, const void* stream) {
  const char* name = kernel_name(function);
  if (!fits(grid, block)) {
    fprintf(stderr, "fake CUDA: no GPU takes this launch: %s, grid %u %u %u, block %u %u %u\n", name, grid.x, grid.y,
            grid.z, block.x, block.y, block.z);
    return fail(cudaErrorInvalidConfiguration);
  }
  Lock lock(mutex());
  launches()[physical(current_device())]++;
  enqueue(kKernel, stream, name, (size_t)grid.x * grid.y * grid.z, nullptr, nullptr, nullptr);
  return cudaSuccess;
}

}  // namespace fake

extern "C" {

// How many kernels this process launched on a physical device so far.
long fake_launches(int device) {
  fake::Lock lock(fake::mutex());
  return fake::launches()[device];
}

void** __cudaRegisterFatBinary(void*) {
  return new void*[1];
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  fake::name_kernel(host, name);
}

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

char __cudaInitModule(void**) {
  return 1;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  fake::pushed = {grid, block, shared, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = fake::pushed.grid;
  *block = fake::pushed.block;
  *shared = fake::pushed.shared;
  *(void**)stream = fake::pushed.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
  return fake::launch(kernel, grid, block, stream);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
  return fake::launch(function, grid, block, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void**, size_t,
                                        cudaStream_t stream) {
  return fake::launch(function, grid, block, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return fake::launch(function, config->gridDim, config->blockDim, config->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 64;
  found->ptxVersion = found->binaryVersion = fake::capability();
  found->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 4;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 4;
  return cudaSuccess;
}
}
