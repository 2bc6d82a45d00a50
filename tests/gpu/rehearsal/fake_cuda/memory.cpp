// Memory and copies.  A copy knows whether its host side is pinned: from pageable memory it is not asynchronous.
#include "fake.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <map>

namespace fake {

struct Range {
  size_t bytes;
  int device;  // visible index
};
using Ranges = std::map<uintptr_t, Range>;

static Ranges& device_ranges() {
  static auto* found = new Ranges;
  return *found;
}

static Ranges& pinned_ranges() {
  static auto* found = new Ranges;
  return *found;
}

static std::map<int, size_t>& used() {
  static auto* found = new std::map<int, size_t>;
  return *found;
}

static size_t whole_pages(size_t bytes) {
  return bytes == 0 ? 4096 : (bytes + 4095) & ~(size_t)4095;
}

void* map_pages(size_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* start = mmap(nullptr, whole_pages(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
  return start == MAP_FAILED ? nullptr : start;
}

void unmap_pages(void* start, size_t bytes) {
  munmap(start, whole_pages(bytes));
}

bool reserve(size_t bytes) {
  if (used()[current_device()] + bytes > memory_per_device()) {
    return false;
  }
  used()[current_device()] += bytes;
  return true;
}

void give_back(size_t bytes, int device) {
  used()[device] -= bytes;
}

void remember_device_range(void* start, size_t bytes) {
  device_ranges()[(uintptr_t)start] = {bytes, current_device()};
}

void forget_device_range(void* start) {
  device_ranges().erase((uintptr_t)start);
}

static const Range* range_of(const Ranges& ranges, const void* address) {
  auto next = ranges.upper_bound((uintptr_t)address);
  if (next == ranges.begin()) {
    return nullptr;
  }
  auto found = std::prev(next);
  return (uintptr_t)address < found->first + found->second.bytes ? &found->second : nullptr;
}

static const char* copy_name(const void* to, const void* from) {
  bool to_device = range_of(device_ranges(), to) != nullptr;
  bool from_device = range_of(device_ranges(), from) != nullptr;
  if (to_device && from_device) {
    return "device to device";
  }
  if (to_device) {
    return range_of(pinned_ranges(), from) != nullptr ? "host to device, pinned" : "host to device, pageable";
  }
  if (from_device) {
    return range_of(pinned_ranges(), to) != nullptr ? "device to host, pinned" : "device to host, pageable";
  }
  return "host to host";
}

static bool only_counted(const void* to, size_t bytes) {
  return !do_large_copies() && bytes > 65536 && range_of(device_ranges(), to) != nullptr;
}

static cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  Lock lock(mutex());
  bool skip = only_counted(to, bytes) && range_of(device_ranges(), from) != nullptr;
  enqueue(kCopy, stream, copy_name(to, from), bytes, to, from, [=] {
    if (!skip) {
      memcpy(to, from, bytes);
    }
  });
  return cudaSuccess;
}

static cudaError_t fill(void* to, int value, size_t bytes, cudaStream_t stream) {
  Lock lock(mutex());
  bool skip = only_counted(to, bytes);
  enqueue(kMemset, stream, "memset", bytes, to, nullptr, [=] {
    if (!skip) {
      memset(to, value, bytes);
    }
  });
  return cudaSuccess;
}

static cudaError_t new_pinned(void** start, size_t bytes) {
  Lock lock(mutex());
  if (forbidden_in_capture()) {
    return refuse(cudaErrorStreamCaptureUnsupported, "cudaHostAlloc");
  }
  *start = map_pages(bytes);
  pinned_ranges()[(uintptr_t)*start] = {bytes, current_device()};
  note(kAllocate, nullptr, "cudaHostAlloc", bytes, *start);
  return cudaSuccess;
}

}  // namespace fake

extern "C" {

// Bytes that are allocated on a visible device.
size_t fake_used(int device) {
  fake::Lock lock(fake::mutex());
  return fake::used()[device];
}

cudaError_t cudaMalloc(void** start, size_t bytes) {
  fake::Lock lock(fake::mutex());
  if (fake::forbidden_in_capture()) {
    return fake::refuse(cudaErrorStreamCaptureUnsupported, "cudaMalloc");
  }
  if (!fake::reserve(bytes)) {
    return fake::fail(cudaErrorMemoryAllocation);
  }
  *start = fake::map_pages(bytes);
  fake::remember_device_range(*start, bytes);
  fake::note(fake::kAllocate, nullptr, "cudaMalloc", bytes, *start);
  return cudaSuccess;
}

cudaError_t cudaFree(void* start) {
  fake::Lock lock(fake::mutex());
  if (fake::forbidden_in_capture()) {
    return fake::refuse(cudaErrorStreamCaptureUnsupported, "cudaFree");
  }
  if (start == nullptr) {
    return cudaSuccess;
  }
  auto found = fake::device_ranges().find((uintptr_t)start);
  if (found == fake::device_ranges().end()) {
    return fake::fail(cudaErrorInvalidValue);
  }
  fake::note(fake::kFree, nullptr, "cudaFree", found->second.bytes, start);
  fake::give_back(found->second.bytes, found->second.device);
  fake::unmap_pages(start, found->second.bytes);
  fake::device_ranges().erase(found);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** start, size_t bytes, cudaStream_t) {
  return cudaMalloc(start, bytes);
}

cudaError_t cudaFreeAsync(void* start, cudaStream_t) {
  return cudaFree(start);
}

cudaError_t cudaHostAlloc(void** start, size_t bytes, unsigned) {
  return fake::new_pinned(start, bytes);
}

cudaError_t cudaMallocHost(void** start, size_t bytes) {
  return fake::new_pinned(start, bytes);
}

cudaError_t cudaFreeHost(void* start) {
  fake::Lock lock(fake::mutex());
  auto found = fake::pinned_ranges().find((uintptr_t)start);
  if (found != fake::pinned_ranges().end()) {
    fake::unmap_pages(start, found->second.bytes);
    fake::pinned_ranges().erase(found);
  }
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* start, size_t bytes, unsigned) {
  fake::Lock lock(fake::mutex());
  fake::pinned_ranges()[(uintptr_t)start] = {bytes, fake::current_device()};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* start) {
  fake::Lock lock(fake::mutex());
  fake::pinned_ranges().erase((uintptr_t)start);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  fake::Lock lock(fake::mutex());
  *total = fake::memory_per_device();
  *available = *total - fake::used()[fake::current_device()];
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
  fake::Lock lock(fake::mutex());
  memset(found, 0, sizeof *found);
  found->device = fake::current_device();
  found->type = cudaMemoryTypeUnregistered;
  if (const fake::Range* range = fake::range_of(fake::device_ranges(), address)) {
    found->type = cudaMemoryTypeDevice;
    found->device = range->device;
    found->devicePointer = const_cast<void*>(address);
  } else if (fake::range_of(fake::pinned_ranges(), address) != nullptr) {
    found->type = cudaMemoryTypeHost;
    found->hostPointer = found->devicePointer = const_cast<void*>(address);
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return fake::copy(to, from, bytes, stream);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return fake::copy(to, from, bytes, stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (fake::forbidden_in_capture()) {
    return fake::refuse(cudaErrorStreamCaptureImplicit, "cudaMemcpy");
  }
  fake::copy(to, from, bytes, nullptr);
  fake::host_waits("cudaMemcpy", nullptr);
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  fake::Lock lock(fake::mutex());
  fake::enqueue(fake::kCopy, stream, fake::copy_name(to, from), width * height, to, from, [=] {
    for (size_t row = 0; row < height; row++) {
      memcpy((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
    }
  });
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return fake::fill(to, value, bytes, nullptr);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return fake::fill(to, value, bytes, stream);
}

cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
  fake::host_waits("cudaMemcpyToSymbol", nullptr);
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static void* place = fake::map_pages(1 << 20);
  *address = place;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  static char place;
  *pool = (cudaMemPool_t)&place;
  return cudaSuccess;
}
}
