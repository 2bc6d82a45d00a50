// Streams, events, host waits, and stream capture by CUDA's rules.
//
// A capture keeps a vector clock for each captured stream: how many captured operations of each stream come before.
// Whoever waits for an event takes over the clock of its record; at the end the first stream must have seen them all.
#include "fake.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <vector>

namespace fake {

using Clock = std::map<const void*, long>;

struct Capture {
  bool on = false;
  const char* broken = nullptr;
  std::thread::id thread;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  unsigned long long id = 0;
  std::map<const void*, Clock> streams;
  std::map<const void*, Clock> marks;  // of events recorded within
  long stray = 0;
  std::shared_ptr<std::vector<Action>> actions;
};

// A graph, and what is made of it: what is done at each launch.
struct Graph {
  std::shared_ptr<std::vector<Action>> actions;
};

static Capture& capture() {
  static auto* found = new Capture;
  return *found;
}

static std::set<const void*>& recorded_outside() {
  static auto* found = new std::set<const void*>;
  return *found;
}

static thread_local cudaStreamCaptureMode own_mode = cudaStreamCaptureModeGlobal;

bool capturing() {
  return capture().on;
}

static bool is_captured(const void* stream) {
  return capture().on && capture().streams.count(stream) > 0;
}

bool forbidden_in_capture() {
  if (!capture().on || own_mode == cudaStreamCaptureModeRelaxed) {
    return false;
  }
  if (capture().thread == std::this_thread::get_id()) {
    return capture().mode != cudaStreamCaptureModeRelaxed;
  }
  return own_mode == cudaStreamCaptureModeGlobal && capture().mode == cudaStreamCaptureModeGlobal;
}

cudaError_t refuse(cudaError_t error, const char* call) {
  if (capture().broken == nullptr) {
    capture().broken = call;
    fprintf(stderr, "fake CUDA: %s breaks the capture of a graph\n", call);
  }
  return fail(error);
}

static void report_stray(const void* stream, const char* name) {
  note(kStray, stream, name);
  if (capture().stray++ < 5) {
    fprintf(stderr, "fake CUDA: outside of the capture, so not replayed: %s\n", name);
  }
}

void enqueue(Kind kind, const void* stream, const char* name, size_t bytes, const void* to, const void* from,
             Action action) {
  Lock lock(mutex());
  note(kind, stream, name, bytes, to, from);
  if (is_captured(stream)) {
    capture().streams[stream][stream]++;
    if (strstr(name, "pageable") != nullptr) {
      fprintf(stderr, "fake CUDA: captured, so each replay reads or writes that host memory: %s\n", name);
    }
    if (action) {
      capture().actions->push_back(action);
    }
    return;
  }
  if (capture().on && capture().thread == std::this_thread::get_id()) {
    report_stray(stream, name);
  }
  if (action) {
    action();
  }
}

static void merge(Clock& to, const Clock& from) {
  for (const auto& [stream, count] : from) {
    if (count > to[stream]) {
      to[stream] = count;
    }
  }
}

static cudaError_t record(cudaEvent_t event, cudaStream_t stream) {
  Lock lock(mutex());
  note(kRecord, stream, "record", 0, event);
  if (is_captured(stream)) {
    capture().marks[event] = capture().streams[stream];
    recorded_outside().erase(event);
  } else {
    capture().marks.erase(event);
    recorded_outside().insert(event);
  }
  return cudaSuccess;
}

// Whether a host may ask about an event now.
static cudaError_t asked(cudaEvent_t event, const char* call) {
  Lock lock(mutex());
  if (!capture().on) {
    return cudaSuccess;
  }
  if (capture().marks.count(event) > 0) {
    return fail(cudaErrorCapturedEvent);
  }
  return forbidden_in_capture() ? refuse(cudaErrorStreamCaptureUnsupported, call) : cudaSuccess;
}

static cudaError_t new_stream(cudaStream_t* stream) {
  *stream = (cudaStream_t) new char[64];
  return cudaSuccess;
}

static cudaError_t new_event(cudaEvent_t* event) {
  *event = (cudaEvent_t) new char[64];
  return cudaSuccess;
}

}  // namespace fake

using fake::capture;
using fake::is_captured;
using fake::Lock;
using fake::mutex;

extern "C" {

// Whether work on this stream is being captured now.
int fake_is_captured(const void* stream) {
  Lock lock(mutex());
  return is_captured(stream) ? 1 : 0;
}

// At each launch of the graph that is being captured, `function` is called with `number` at this place of its order.
void fake_capture_call(void (*function)(long), long number) {
  Lock lock(mutex());
  capture().actions->push_back([=] { function(number); });
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return fake::new_stream(stream);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return fake::new_stream(stream);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return fake::new_stream(stream);
}

cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;  // its address must not be given to another one: the trace tells streams apart by it
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  if (fake::capturing()) {
    Lock lock(mutex());
    return fake::refuse(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize");
  }
  fake::host_waits("cudaDeviceSynchronize", nullptr);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (is_captured(stream)) {
    Lock lock(mutex());
    return fake::refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
  }
  fake::host_waits("cudaStreamSynchronize", stream);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (is_captured(stream)) {
    Lock lock(mutex());
    return fake::refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery");
  }
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return fake::new_event(event);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return fake::new_event(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Lock lock(mutex());
  fake::recorded_outside().erase(event);
  capture().marks.erase(event);
  delete[] (char*)event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return fake::record(event, stream);
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return fake::record(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return fake::asked(event, "cudaEventQuery");
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  cudaError_t error = fake::asked(event, "cudaEventSynchronize");
  if (error == cudaSuccess) {
    fake::host_waits("cudaEventSynchronize", nullptr);
  }
  return error;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;  // there is no time here
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Lock lock(mutex());
  fake::note(fake::kWaitEvent, stream, "wait", 0, event);
  if (!capture().on) {
    return cudaSuccess;
  }
  auto mark = capture().marks.find(event);
  if (mark != capture().marks.end()) {
    fake::merge(capture().streams[stream], mark->second);  // the stream is captured from here on
    return cudaSuccess;
  }
  if (is_captured(stream) && fake::recorded_outside().count(event) > 0) {
    return fake::refuse(cudaErrorStreamCaptureIsolation, "waiting for an event that was recorded outside");
  }
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  Lock lock(mutex());
  if (stream == nullptr || capture().on) {
    return fake::fail(cudaErrorStreamCaptureUnsupported);
  }
  unsigned long long id = capture().id + 1;
  capture() = fake::Capture{};
  capture().on = true;
  capture().id = id;
  capture().thread = std::this_thread::get_id();
  capture().mode = mode;
  capture().streams[stream];
  capture().actions = std::make_shared<std::vector<fake::Action>>();
  fake::note(fake::kGraph, stream, "begin capture");
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Lock lock(mutex());
  capture().on = false;
  *graph = nullptr;
  fake::note(fake::kGraph, stream, "end capture");
  if (capture().broken != nullptr) {
    return fake::fail(cudaErrorStreamCaptureInvalidated);
  }
  for (auto& [other, clock] : capture().streams) {
    if (capture().streams[stream][other] < clock[other]) {
      fprintf(stderr, "fake CUDA: a captured stream was not joined before the end of the capture\n");
      return fake::fail(cudaErrorStreamCaptureUnjoined);
    }
  }
  *graph = (cudaGraph_t) new fake::Graph{capture().actions};
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Lock lock(mutex());
  *status = cudaStreamCaptureStatusNone;
  if (is_captured(stream)) {
    *status = capture().broken != nullptr ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  }
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake::own_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = (cudaGraphExec_t) new fake::Graph{((fake::Graph*)graph)->actions};
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t made, cudaStream_t stream) {
  fake::note(fake::kGraph, stream, "launch");
  for (auto& action : *((fake::Graph*)made)->actions) {
    action();
  }
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete (fake::Graph*)graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t made) {
  delete (fake::Graph*)made;
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
  function(argument);
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* argument, unsigned) {
  function(stream, cudaSuccess, argument);
  return cudaSuccess;
}
}

// The signature differs between CUDA 12 and 13, by one argument in the middle.
extern "C" {
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  if (edges != nullptr) {
    *edges = nullptr;
  }
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                        cudaGraph_t* graph, const cudaGraphNode_t** nodes, size_t* count) {
#endif
  cudaStreamIsCapturing(stream, status);
  if (id != nullptr) {
    *id = capture().id;
  }
  if (graph != nullptr) {
    *graph = nullptr;
  }
  if (nodes != nullptr) {
    *nodes = nullptr;
  }
  if (count != nullptr) {
    *count = 0;
  }
  return cudaSuccess;
}
}
