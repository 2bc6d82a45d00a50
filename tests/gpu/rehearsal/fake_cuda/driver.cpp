// The driver: modules and launches for Triton, reserved addresses and their mapping for expandable segments.
#include "fake.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <unordered_map>

namespace fake {

struct Piece {
  size_t bytes;
  int device;
};

static std::unordered_map<unsigned long long, Piece>& pieces() {
  static auto* found = new std::unordered_map<unsigned long long, Piece>;
  return *found;
}

static unsigned long long next_piece = 1;

static CUresult launch_by_driver(const void* function, dim3 grid, dim3 block, const void* stream) {
  return launch(function, grid, block, stream) == cudaSuccess ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static CUresult anything_else() {
  return CUDA_SUCCESS;
}

// The driver's function of that name.  Whatever else is asked for does nothing, successfully.
static void* entry(const char* name) {
  static void* self = dlopen(getenv("MIRAI_FAKE_LIBRARY"), RTLD_NOW);
  void* found = self == nullptr ? nullptr : dlsym(self, name);
  return found == nullptr ? (void*)anything_else : found;
}

}  // namespace fake

extern "C" {

CUresult cuInit(unsigned) {
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = fake::visible_devices();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  cudaDeviceGetAttribute(value, (cudaDeviceAttr)attribute, device);  // the numbers are the same
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)(size_t)(device + 1);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)(size_t)(fake::current_device() + 1);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = fake::current_device();
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the fake CUDA driver";
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *bytes = 2 << 20;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* start, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  fake::Lock lock(fake::mutex());
  void* found = fake::map_pages(bytes);
  if (found == nullptr) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  fake::remember_device_range(found, bytes);
  *start = (CUdeviceptr)found;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr start, size_t bytes) {
  fake::Lock lock(fake::mutex());
  fake::forget_device_range((void*)start);
  fake::unmap_pages((void*)start, bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp*,
                     unsigned long long) {
  fake::Lock lock(fake::mutex());
  if (!fake::reserve(bytes)) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  *handle = fake::next_piece++;
  fake::pieces()[*handle] = {bytes, fake::current_device()};
  fake::note(fake::kAllocate, nullptr, "cuMemCreate", bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  fake::Lock lock(fake::mutex());
  auto found = fake::pieces().find(handle);
  if (found == fake::pieces().end()) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  fake::give_back(found->second.bytes, found->second.device);
  fake::pieces().erase(found);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  return CUDA_SUCCESS;  // the reserved addresses have pages already
}

CUresult cuMemUnmap(CUdeviceptr start, size_t bytes) {
  madvise((void*)start, bytes, MADV_DONTNEED);
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) {
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
    *(CUdeviceptr*)value = address;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule* module, const char*) {
  *module = (CUmodule) new char[8];
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void*) {
  *module = (CUmodule) new char[8];
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule) {
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const char* full = fake::forever(std::string("module:") + name);
  fake::name_kernel(full, full);
  *function = (CUfunction)full;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : *value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) {
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned, CUstream stream, void**, void**) {
  return fake::launch_by_driver(function, dim3{x, y, z}, dim3{block_x, block_y, block_z}, stream);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void**, void**) {
  return fake::launch_by_driver(function, dim3{c->gridDimX, c->gridDimY, c->gridDimZ},
                                dim3{c->blockDimX, c->blockDimY, c->blockDimZ}, c->hStream);
}

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = fake::entry(name);
  if (result != nullptr) {
    *result = cudaDriverEntryPointSuccess;
  }
  return cudaSuccess;
}

#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, 0, result);
}
#endif
}
