// NCCL between processes of one machine: the ranks of a communicator meet in a shared file, within the call itself.
//
// Each rank has a slot in the file.  A collective goes through it in pieces: put, meet, get, meet.
#include "fake.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

namespace fake {

const size_t kSlot = 32u << 20;
const size_t kHead = 4096;
const int kPatienceSeconds = 300;

struct Meeting {
  std::atomic<int> arrived;
  std::atomic<int> turn;
};

struct Communicator {
  std::string name;
  int ranks;
  int rank;
  char* file = nullptr;
  int turn = 0;
  int splits = 0;

  char* slot(int of) const {
    return file + kHead + (size_t)of * kSlot;
  }
};

[[noreturn]] static void stop(const char* why, const std::string& what) {
  fprintf(stderr, "fake NCCL: %s: %s\n", why, what.c_str());
  abort();
}

static std::string path_of(const std::string& name) {
  const char* folder = getenv("MIRAI_FAKE_MEETINGS");
  return std::string(folder != nullptr ? folder : "/tmp") + "/mirai-fake-nccl-" + name;
}

static Communicator* join(const std::string& name, int ranks, int rank) {
  auto* made = new Communicator{name, ranks, rank};
  if (ranks > 1) {
    size_t bytes = kHead + (size_t)ranks * kSlot;
    int file = open(path_of(name).c_str(), O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, (off_t)bytes) != 0) {
      stop("cannot make the file to meet in", path_of(name));
    }
    made->file = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
  }
  return made;
}

static void meet(Communicator* c) {
  if (c->ranks == 1) {
    return;
  }
  auto* meeting = (Meeting*)c->file;
  c->turn ^= 1;
  if (meeting->arrived.fetch_add(1) == c->ranks - 1) {
    meeting->arrived = 0;
    meeting->turn = c->turn;
    return;
  }
  time_t since = time(nullptr);
  while (meeting->turn.load() != c->turn) {
    usleep(50);
    if (time(nullptr) - since > kPatienceSeconds) {
      stop("another rank did not come", c->name);
    }
  }
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

enum Type { kInt8, kUint8, kInt32, kUint32, kInt64, kUint64, kHalf, kFloat, kDouble, kBfloat16 };
enum Operation { kSum, kProduct, kMaximum, kMinimum, kAverage };

static size_t bytes_of(int type) {
  static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return bytes[type];
}

static float widen(uint16_t bfloat) {
  uint32_t bits = (uint32_t)bfloat << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static uint16_t narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
static T combined(T a, T b, int operation) {
  switch (operation) {
    case kProduct:
      return a * b;
    case kMaximum:
      return a > b ? a : b;
    case kMinimum:
      return a < b ? a : b;
    default:
      return a + b;
  }
}

// Over the first `count` elements of all slots, in the order of ranks.
template <class T>
static void reduce(char* out, Communicator* c, size_t count, int operation) {
  auto* result = (T*)out;
  for (size_t i = 0; i < count; i++) {
    T value = ((T*)c->slot(0))[i];
    for (int rank = 1; rank < c->ranks; rank++) {
      value = combined(value, ((T*)c->slot(rank))[i], operation);
    }
    result[i] = operation == kAverage ? value / (T)c->ranks : value;
  }
}

static void reduce_bfloat16(char* out, Communicator* c, size_t count, int operation) {
  for (size_t i = 0; i < count; i++) {
    float value = widen(((uint16_t*)c->slot(0))[i]);
    for (int rank = 1; rank < c->ranks; rank++) {
      value = combined(value, widen(((uint16_t*)c->slot(rank))[i]), operation);
    }
    ((uint16_t*)out)[i] = narrow(operation == kAverage ? value / (float)c->ranks : value);
  }
}

static void reduce_slots(char* out, Communicator* c, size_t count, int type, int operation) {
  switch (type) {
    case kInt8:
      return reduce<int8_t>(out, c, count, operation);
    case kUint8:
      return reduce<uint8_t>(out, c, count, operation);
    case kInt32:
      return reduce<int32_t>(out, c, count, operation);
    case kInt64:
      return reduce<int64_t>(out, c, count, operation);
    case kFloat:
      return reduce<float>(out, c, count, operation);
    case kDouble:
      return reduce<double>(out, c, count, operation);
    case kBfloat16:
      return reduce_bfloat16(out, c, count, operation);
    default:
      stop("this type is not added up here", std::to_string(type));
  }
}

// --- collectives ----------------------------------------------------------------------------------------------------

// Walks `bytes` in pieces that fit a slot; `put` and `get` have (offset, length) in bytes.
template <class Put, class Get>
static void in_pieces(Communicator* c, size_t bytes, Put put, Get get) {
  for (size_t at = 0; at < bytes; at += kSlot) {
    size_t length = bytes - at < kSlot ? bytes - at : kSlot;
    put(at, length);
    meet(c);
    get(at, length);
    meet(c);
  }
}

static void alone(const void* from, void* to, size_t bytes) {
  if (from != to && to != nullptr && (do_large_copies() || bytes <= 65536)) {
    memcpy(to, from, bytes);
  }
}

static void reduce_to(const void* from, void* to, size_t count, int type, int operation, bool wanted, Communicator* c) {
  size_t each = bytes_of(type);
  in_pieces(
      c, count * each, [&](size_t at, size_t n) { memcpy(c->slot(c->rank), (const char*)from + at, n); },
      [&](size_t at, size_t n) {
        if (wanted) {
          reduce_slots((char*)to + at, c, n / each, type, operation);
        }
      });
}

static void broadcast(const void* from, void* to, size_t bytes, int root, Communicator* c) {
  in_pieces(
      c, bytes,
      [&](size_t at, size_t n) {
        if (c->rank == root) {
          memcpy(c->slot(root), (const char*)from + at, n);
        }
      },
      [&](size_t at, size_t n) { memcpy((char*)to + at, c->slot(root), n); });
}

static void all_gather(const void* from, void* to, size_t bytes, Communicator* c) {
  in_pieces(
      c, bytes, [&](size_t at, size_t n) { memcpy(c->slot(c->rank), (const char*)from + at, n); },
      [&](size_t at, size_t n) {
        for (int rank = 0; rank < c->ranks; rank++) {
          memcpy((char*)to + rank * bytes + at, c->slot(rank), n);
        }
      });
}

static void reduce_scatter(const void* from, void* to, size_t count, int type, int operation, Communicator* c) {
  std::vector<char> mine(count * bytes_of(type));  // `to` may lie within `from`
  for (int owner = 0; owner < c->ranks; owner++) {
    const char* part = (const char*)from + owner * mine.size();
    reduce_to(part, mine.data(), count, type, operation, owner == c->rank, c);
  }
  memcpy(to, mine.data(), mine.size());
}

static int run(const char* name, const void* from, void* to, size_t bytes, size_t traffic, Communicator* c,
               cudaStream_t stream, Action several) {
  enqueue(kCollective, stream, name, traffic, to, from, [=] {
    if (c->ranks == 1) {
      alone(from, to, bytes);
    } else {
      several();
    }
  });
  return 0;
}

}  // namespace fake

using fake::Communicator;

extern "C" {

struct UniqueId {
  char text[128];
};

int ncclGetVersion(int* version) {
  *version = 22707;
  return 0;
}

int ncclGetUniqueId(UniqueId* id) {
  static int number = 0;
  snprintf(id->text, sizeof id->text, "%d-%ld-%d", getpid(), (long)time(nullptr), number++);
  return 0;
}

int ncclCommInitRank(Communicator** made, int ranks, UniqueId id, int rank) {
  *made = fake::join(id.text, ranks, rank);
  return 0;
}

int ncclCommInitRankConfig(Communicator** made, int ranks, UniqueId id, int rank, void*) {
  *made = fake::join(id.text, ranks, rank);
  return 0;
}

int ncclCommInitRankScalable(Communicator** made, int ranks, int rank, int, UniqueId* id, void*) {
  *made = fake::join(id->text, ranks, rank);
  return 0;
}

int ncclCommSplit(Communicator* whole, int color, int key, Communicator** made, void*) {
  int number = whole->splits++;
  if (whole->ranks == 1) {
    *made = fake::join(whole->name + "-alone", 1, 0);
    return 0;
  }
  int mine[2] = {color, key};
  memcpy(whole->slot(whole->rank), mine, sizeof mine);
  fake::meet(whole);
  int ranks = 0, rank = 0;
  for (int other = 0; other < whole->ranks; other++) {
    auto* theirs = (int*)whole->slot(other);
    if (theirs[0] == color) {
      ranks++;
      rank += theirs[1] < key || (theirs[1] == key && other < whole->rank) ? 1 : 0;
    }
  }
  fake::meet(whole);
  std::string name = whole->name + "-" + std::to_string(number) + "-" + std::to_string(color);
  *made = color < 0 ? nullptr : fake::join(name, ranks, rank);
  return 0;
}

int ncclCommDestroy(Communicator* c) {
  if (c->file != nullptr) {
    munmap(c->file, fake::kHead + (size_t)c->ranks * fake::kSlot);
    unlink(fake::path_of(c->name).c_str());  // who still has it open keeps it
  }
  delete c;
  return 0;
}

int ncclCommCount(Communicator* c, int* ranks) {
  *ranks = c->ranks;
  return 0;
}

int ncclCommUserRank(Communicator* c, int* rank) {
  *rank = c->rank;
  return 0;
}

int ncclCommGetAsyncError(Communicator*, int* error) {
  *error = 0;
  return 0;
}

const char* ncclGetErrorString(int) {
  return "an error of the fake NCCL";
}

const char* ncclGetLastError(void*) {
  return "";
}

int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, Communicator* c, cudaStream_t stream) {
  size_t bytes = count * fake::bytes_of(type);
  return fake::run("ncclAllReduce", from, to, bytes, bytes, c, stream,
                   [=] { fake::reduce_to(from, to, count, type, op, true, c); });
}

int ncclReduce(const void* from, void* to, size_t count, int type, int op, int root, Communicator* c,
               cudaStream_t stream) {
  size_t bytes = count * fake::bytes_of(type);
  return fake::run("ncclReduce", from, to, bytes, bytes, c, stream,
                   [=] { fake::reduce_to(from, to, count, type, op, c->rank == root, c); });
}

int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Communicator* c, cudaStream_t stream) {
  size_t bytes = count * fake::bytes_of(type);
  return fake::run("ncclBroadcast", from, to, bytes, bytes, c, stream,
                   [=] { fake::broadcast(from, to, bytes, root, c); });
}

int ncclBcast(void* both, size_t count, int type, int root, Communicator* c, cudaStream_t stream) {
  return ncclBroadcast(both, both, count, type, root, c, stream);
}

int ncclAllGather(const void* from, void* to, size_t count, int type, Communicator* c, cudaStream_t stream) {
  size_t bytes = count * fake::bytes_of(type);
  return fake::run("ncclAllGather", from, to, bytes, bytes * c->ranks, c, stream,
                   [=] { fake::all_gather(from, to, bytes, c); });
}

int ncclReduceScatter(const void* from, void* to, size_t count, int type, int op, Communicator* c,
                      cudaStream_t stream) {
  size_t bytes = count * fake::bytes_of(type);
  return fake::run("ncclReduceScatter", from, to, bytes, bytes * c->ranks, c, stream,
                   [=] { fake::reduce_scatter(from, to, count, type, op, c); });
}
}
