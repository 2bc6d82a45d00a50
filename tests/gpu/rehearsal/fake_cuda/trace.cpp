// The trace: what was asked of the devices, in order, readable from Python through ctypes.
#include "fake.h"

#include <cxxabi.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <set>
#include <vector>

namespace fake {

static std::atomic<bool> tracing{false};
static void (*wait_watcher)(const char*) = nullptr;

// What libraries still use while the process ends must not have been destroyed: it is never freed.
static std::vector<Event>& events() {
  static auto* found = new std::vector<Event>;
  return *found;
}

std::recursive_mutex& mutex() {
  static auto* found = new std::recursive_mutex;
  return *found;
}

const char* forever(const std::string& text) {
  static auto* texts = new std::set<std::string>;
  Lock lock(mutex());
  return texts->insert(text).first->c_str();
}

void note(Kind kind, const void* stream, const char* name, size_t bytes, const void* to, const void* from) {
  if (!tracing) {
    return;
  }
  Lock lock(mutex());
  events().push_back({kind, physical(current_device()), name, stream, bytes, to, from});
}

void host_waits(const char* call, const void* stream) {
  note(kWait, stream, call);
  if (wait_watcher != nullptr) {
    wait_watcher(call);
  }
}

}  // namespace fake

extern "C" {

void fake_trace_start() {
  fake::Lock lock(fake::mutex());
  fake::events().clear();
  fake::tracing = true;
}

void fake_trace_stop() {
  fake::tracing = false;
}

size_t fake_events(const fake::Event** first) {
  fake::Lock lock(fake::mutex());
  *first = fake::events().data();
  return fake::events().size();
}

// The watcher gets the name of the call that makes the host wait, in the thread that waits.
void fake_watch_waits(void (*watcher)(const char*)) {
  fake::wait_watcher = watcher;
}

// The readable form of a kernel's name, in `out` of `size` bytes.
void fake_demangle(const char* name, char* out, size_t size) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  strncpy(out, status == 0 ? readable : name, size - 1);
  out[size - 1] = 0;
  free(readable);
}
}
