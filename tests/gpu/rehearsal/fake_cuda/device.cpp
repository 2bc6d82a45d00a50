// Devices: how many, which, and what they say of themselves.
#include "fake.h"

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

namespace fake {

static double setting(const char* name, double otherwise) {
  const char* given = getenv(name);
  return given != nullptr && *given != 0 ? atof(given) : otherwise;
}

int capability() {
  static const int value = (int)setting("MIRAI_FAKE_CAPABILITY", 90);
  return value;
}

size_t memory_per_device() {
  static const size_t value = (size_t)(setting("MIRAI_FAKE_MEMORY_GB", 80) * (1ull << 30));
  return value;
}

bool do_large_copies() {
  static const bool value = setting("MIRAI_FAKE_VALUES", 1e12) > 1e8;
  return value;
}

static std::string uuid_of(int index) {
  char text[64];
  snprintf(text, sizeof text, "GPU-%02x%02x%02x%02x-fa4e-fa4e-fa4e-fa4efa4efa4e", index + 1, index + 1, index + 1,
           index + 1);
  return text;
}

// The index of an entry of CUDA_VISIBLE_DEVICES, or -1.
static int named(const std::string& entry, int present) {
  if (!entry.empty() && isdigit((unsigned char)entry[0])) {
    int index = atoi(entry.c_str());
    return index < present ? index : -1;
  }
  for (int index = 0; index < present && entry.size() > 4; index++) {
    if (uuid_of(index).compare(0, entry.size(), entry) == 0) {
      return index;
    }
  }
  return -1;
}

static std::vector<int> chosen_devices() {
  std::vector<int> found;
  int present = (int)setting("MIRAI_FAKE_GPUS", 1);
  const char* chosen = getenv("CUDA_VISIBLE_DEVICES");
  if (chosen == nullptr) {
    for (int index = 0; index < present; index++) {
      found.push_back(index);
    }
    return found;
  }
  std::string rest = chosen;
  while (!rest.empty()) {  // CUDA ignores what follows an entry that is not there
    size_t comma = rest.find(',');
    int index = named(rest.substr(0, comma), present);
    if (index < 0) {
      break;
    }
    found.push_back(index);
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
  }
  return found;
}

static const std::vector<int>& devices() {
  static const auto* found = new std::vector<int>(chosen_devices());
  return *found;
}

static thread_local int current = 0;
static thread_local cudaError_t last_error = cudaSuccess;

int visible_devices() {
  return (int)devices().size();
}

int physical(int device) {
  return device >= 0 && device < visible_devices() ? devices()[device] : -1;
}

int current_device() {
  return current;
}

cudaError_t fail(cudaError_t error) {
  last_error = error;
  return error;
}

static bool is_hopper() {
  return capability() >= 90;
}

// What differs between the two: an H100 (SXM) and an A100 (SXM, 80 GB).
static int processors() {
  return is_hopper() ? 132 : 108;
}
static int shared_optin() {
  return is_hopper() ? 232448 : 166912;
}
static int shared_of_processor() {
  return is_hopper() ? 233472 : 167936;
}
static int l2_bytes() {
  return (is_hopper() ? 50 : 40) << 20;
}

static const std::map<int, int>& attributes() {
  static const auto* found = new std::map<int, int>{
      {cudaDevAttrMultiProcessorCount, processors()},
      {cudaDevAttrComputeCapabilityMajor, capability() / 10},
      {cudaDevAttrComputeCapabilityMinor, capability() % 10},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_optin()},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, shared_of_processor()},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrL2CacheSize, l2_bytes()},
      {cudaDevAttrClockRate, 1980000},
      {cudaDevAttrMemoryClockRate, 2619000},
      {cudaDevAttrGlobalMemoryBusWidth, 5120},
      {cudaDevAttrIntegrated, 0},
      {cudaDevAttrComputeMode, 0},
      {cudaDevAttrTccDriver, 0},
  };
  return *found;
}

static void describe(cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  const char* name = is_hopper() ? "NVIDIA H100 80GB HBM3 (fake)" : "NVIDIA A100-SXM4-80GB (fake)";
  snprintf(p->name, sizeof p->name, "%s", name);
  p->totalGlobalMem = memory_per_device();
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->multiProcessorCount = processors();
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = shared_optin();
  p->sharedMemPerMultiprocessor = shared_of_processor();
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = 65536;
  p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = l2_bytes();
  p->memoryBusWidth = 5120;
  p->textureAlignment = 512;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = 1;
  p->cooperativeLaunch = p->memoryPoolsSupported = 1;
  p->pciBusID = physical(device) + 1;
  memset(p->uuid.bytes, 0xfa, sizeof p->uuid.bytes);
  memset(p->uuid.bytes, physical(device) + 1, 4);
}

static const std::map<int, const char*>& messages() {
  static const auto* found = new std::map<int, const char*>{
      {cudaSuccess, "no error"},
      {cudaErrorInvalidDevice, "invalid device ordinal"},
      {cudaErrorNoDevice, "no CUDA-capable device is detected"},
      {cudaErrorMemoryAllocation, "out of memory"},
      {cudaErrorInvalidConfiguration, "invalid configuration argument"},
      {cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"},
      {cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream"},
      {cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"},
      {cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"},
      {cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"},
      {cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"},
  };
  return *found;
}

}  // namespace fake

extern "C" {

// Of a visible device: its index among those that exist.
int fake_physical(int device) {
  return fake::physical(device);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = fake::visible_devices();
  return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= fake::visible_devices()) {
    return fake::fail(cudaErrorInvalidDevice);
  }
  fake::current = device;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = fake::current;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= fake::visible_devices()) {
    return fake::fail(cudaErrorInvalidDevice);
  }
  fake::describe(properties, device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  auto found = fake::attributes().find(attribute);
  *value = found == fake::attributes().end() ? 1 : found->second;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size, "0000:%02x:00.0", fake::physical(device) + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) {
    *least = 0;
  }
  if (greatest != nullptr) {
    *greatest = -5;
  }
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  cudaError_t error = fake::last_error;
  fake::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() {
  return fake::last_error;
}

const char* cudaGetErrorString(cudaError_t error) {
  auto found = fake::messages().find(error);
  return found == fake::messages().end() ? "an error of the fake CUDA" : found->second;
}

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : fake::forever("fake CUDA error " + std::to_string(error));
}
}
