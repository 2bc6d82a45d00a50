// NVML, as much as torch's allocator asks of it: which device this is, and that no fabric connects it to others.
//
// torch opens it under its own name, libnvidia-ml.so.1, which is a link to this library.
namespace {

constexpr int kSuccess = 0;
constexpr int kNotSupported = 3;  // NVML_ERROR_NOT_SUPPORTED
int the_device;

// nvmlGpuFabricInfo_v2_t, as far as torch reads it.
struct FabricInfo {
  unsigned version;
  unsigned char cluster[16];
  int status;
  unsigned clique;
  unsigned char state;
};

}  // namespace

extern "C" {

int nvmlInit_v2() {
  return kSuccess;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) {
  *device = &the_device;
  return kSuccess;
}

// The answer of a device without NVLink switches: a state of 0, "not supported".
int nvmlDeviceGetGpuFabricInfoV(void*, FabricInfo* info) {
  const unsigned version = info->version;
  *info = {};
  info->version = version;
  return kSuccess;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, int*) {
  return kNotSupported;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) {
  return kNotSupported;
}

int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) {
  *count = 0;
  return kSuccess;
}

int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = 13000;
  return kSuccess;
}
}
