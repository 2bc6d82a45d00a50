// What the parts of the fake CUDA share: a lock, the trace of what was asked of the devices, and the rules of capture.
//
// "Device" memory is host memory.  Copies, memsets and collectives are done at once, kernels are only counted: values are
// the business of the Python side, which computes them over the same memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <mutex>
#include <string>

namespace fake {

// --- settings, from the environment ---------------------------------------------------------------------------------

int capability();           // 80 or 90, as MIRAI_FAKE_CAPABILITY says
size_t memory_per_device(); // bytes, from MIRAI_FAKE_MEMORY_GB
int visible_devices();      // how many the process sees: MIRAI_FAKE_GPUS of them exist, CUDA_VISIBLE_DEVICES chooses
int physical(int device);   // which of the existing ones a visible one is
int current_device();
bool do_large_copies();     // false where values are not computed: large copies within the device are then only counted

// --- errors ---------------------------------------------------------------------------------------------------------

cudaError_t fail(cudaError_t error);  // remembers it for cudaGetLastError

// --- the trace ------------------------------------------------------------------------------------------------------

enum Kind : int { kKernel, kCopy, kMemset, kWait, kAllocate, kFree, kRecord, kWaitEvent, kGraph, kCollective, kStray };

// One thing that was asked of a device.  The layout is known to library.py.
struct Event {
  int kind;
  int device;  // physical
  const char* name;
  const void* stream;
  unsigned long long bytes;  // of a kernel: its blocks
  const void* to;            // also: the event that is recorded or waited for
  const void* from;
};

using Lock = std::lock_guard<std::recursive_mutex>;
std::recursive_mutex& mutex();
void note(Kind kind, const void* stream, const char* name, size_t bytes = 0, const void* to = nullptr,
          const void* from = nullptr);
// Tells the trace and whoever watches that the host waits.  Not to be called with the lock: the watcher is Python.
void host_waits(const char* call, const void* stream);
const char* forever(const std::string& text);  // a copy that stays

// --- capture --------------------------------------------------------------------------------------------------------

using Action = std::function<void()>;
// Work on a stream: noted, and done now, or at each launch of the graph where the stream is being captured.
void enqueue(Kind kind, const void* stream, const char* name, size_t bytes, const void* to, const void* from,
             Action action);
bool capturing();             // whether any stream is being captured
bool forbidden_in_capture();  // whether this thread may now make no call that could wait or that touches all streams
cudaError_t refuse(cudaError_t error, const char* call);  // breaks the capture

// --- memory ---------------------------------------------------------------------------------------------------------

void* map_pages(size_t bytes);
void unmap_pages(void* start, size_t bytes);
bool reserve(size_t bytes);  // counts bytes of the current device as used; false: there are not so many
void give_back(size_t bytes, int device);
void remember_device_range(void* start, size_t bytes);
void forget_device_range(void* start);

// --- kernels --------------------------------------------------------------------------------------------------------

const char* kernel_name(const void* function);
void name_kernel(const void* function, const char* name);
cudaError_t launch(const void* function, dim3 grid, dim3 block, const void* stream);

}  // namespace fake
