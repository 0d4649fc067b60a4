/* libcuda.so.1 for tests: the functions that vcache/memory calls, over memory of the host that processes share.
 *
 * It keeps the rules of CUDA's documentation that our code has to keep, and is stricter where CUDA leaves things undefined: no
 * access before cuMemSetAccess, no address range given back while it is mapped, no own IPC handle opened, a current context where
 * one is needed. It behaves as if another thread were capturing a graph in global mode all the while: unsafe calls in a thread
 * that is not in relaxed mode are refused, and so is waiting for the whole device. Copies happen when their stream is waited for,
 * and no sooner.
 *
 * STAND_IN_LOG: a file that gets a line for each call. STAND_IN_FAIL="cuMemMap": that call fails. STAND_IN_LACKS="102": the device
 * attribute of this number is 0. STAND_IN_PEERS=0: no device may use the memory of another. STAND_IN_GATE: a pipe; host memory is
 * pinned once somebody has opened it to write. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DEVICES = 2, FREE_BYTES = 64 << 20, GRANULARITY = 2 << 20, GLOBAL = 0, RELAXED = 2, RESERVED = 1, MAPPED = 2, PINNED = 3 };
enum { OK, INVALID_VALUE = 1, NO_MEMORY = 2, INVALID_DEVICE = 101, NO_CONTEXT = 201, MAP_FAILED_ = 205, INVALID_HANDLE = 400,
       CAPTURING = 900, UNKNOWN = 999 };
typedef uint64_t ptr;
struct allocation { int fd, dev; size_t size; };
static struct { ptr at; size_t size; int fd, state, owned; } ranges[64];
static __thread int capture_mode = GLOBAL, depth;
static __thread void *stack[16];
static __thread struct { void *to; const void *from; size_t size; } queued[256];
static __thread int copies;

static int logged(const char *name) {
  const char *file = getenv("STAND_IN_LOG"), *fail = getenv("STAND_IN_FAIL");
  FILE *log = file ? fopen(file, "a") : NULL;
  if (log) fprintf(log, "%s\n", name), fclose(log);
  return fail && !strcmp(fail, name) ? UNKNOWN : OK;
}
static int unsafe(const char *name) {
  int failed = logged(name);
  return failed ? failed : capture_mode != RELAXED ? CAPTURING : depth ? OK : NO_CONTEXT;
}
#define LOGGED int failed = logged(__func__); if (failed) return failed
#define UNSAFE int failed = unsafe(__func__); if (failed) return failed
static int slot(ptr at) {
  for (int i = 0; i < 64; i++) if (ranges[i].at == at) return i;
  return -1;
}
static int take(ptr at, size_t size, int fd, int state, int owned) {
  int i = slot(0);
  ranges[i].at = at, ranges[i].size = size, ranges[i].fd = fd, ranges[i].state = state, ranges[i].owned = owned;
  return OK;
}
static int shared_memory(size_t size) { /* not zeroed, as a device's is not */
  int fd = memfd_create("vram", MFD_CLOEXEC);
  char left_behind[4096];
  memset(left_behind, 0xEE, sizeof left_behind);
  for (size_t done = 0; done < size; done += sizeof left_behind)
    if (write(fd, left_behind, sizeof left_behind) != sizeof left_behind) abort();
  return fd;
}

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (found) *found = *function ? 0 : 1;
  return *function ? OK : 500;
}
int cuGetErrorString(int status, const char **text) { return *text = "says the stand-in", OK; }
int cuGetErrorName(int status, const char **text) { return *text = "an error", OK; }
int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
int cuInit(unsigned flags) { LOGGED; return OK; }
int cuDeviceGetCount(int *count) { return *count = DEVICES, OK; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal < DEVICES ? OK : INVALID_DEVICE; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { return memset(uuid, 0xA0 + device, 16), OK; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  const char *lacks = getenv("STAND_IN_LACKS");
  return *value = !(lacks && atoi(lacks) == which), OK;
}
int cuDeviceCanAccessPeer(int *can, int device, int peer) {
  const char *peers = getenv("STAND_IN_PEERS");
  return *can = !(peers && !strcmp(peers, "0")), OK;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  LOGGED;
  char name[32];
  snprintf(name, sizeof name, "context on %d", device);
  return logged(name), *context = (void *)(intptr_t)(device + 1), OK;
}
int cuCtxPushCurrent(void *context) { return stack[depth++] = context, OK; }
int cuCtxPopCurrent(void **context) { return *context = stack[--depth], OK; }
int cuCtxSynchronize(void) { logged(__func__); return CAPTURING; }
int cuThreadExchangeStreamCaptureMode(int *mode) {
  int before = capture_mode;
  return capture_mode = *mode, *mode = before, OK;
}
int cuStreamCreate(void **stream, unsigned flags) { UNSAFE; return *stream = (void *)8, flags == 1 ? OK : INVALID_VALUE; }
int cuStreamDestroy(void *stream) { UNSAFE; return OK; }
int cuStreamSynchronize(void *stream) {
  UNSAFE;
  for (int i = 0; i < copies; i++) memcpy(queued[i].to, queued[i].from, queued[i].size);
  return copies = 0, OK;
}
static int enqueue(void *to, const void *from, size_t size) {
  if (copies == 256) abort();
  queued[copies].to = to, queued[copies].from = from, queued[copies++].size = size;
  return OK;
}
int cuMemGetInfo(size_t *free_bytes, size_t *total) { UNSAFE; return *free_bytes = *total = FREE_BYTES, OK; }
int cuMemsetD8Async(ptr at, unsigned char value, size_t size, void *stream) { UNSAFE; return memset((void *)at, value, size), OK; }
int cuMemcpyAsync(ptr to, ptr from, size_t size, void *stream) { UNSAFE; return enqueue((void *)to, (void *)from, size); }
int cuMemcpyHtoDAsync(ptr to, const void *from, size_t size, void *stream) { UNSAFE; return enqueue((void *)to, from, size); }
int cuMemcpyDtoHAsync(void *to, ptr from, size_t size, void *stream) { UNSAFE; return enqueue(to, (void *)from, size); }

int cuMemAlloc(ptr *at, size_t size) {
  UNSAFE;
  if (size % GRANULARITY) return INVALID_VALUE; /* others would share its block */
  int fd = shared_memory(size);
  *at = (ptr)mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return take(*at, size, fd, MAPPED, 1);
}
static int give_up(ptr at, int owned) {
  int i = slot(at);
  if (i < 0 || !at || ranges[i].owned != owned) return INVALID_VALUE;
  munmap((void *)at, ranges[i].size), close(ranges[i].fd);
  return ranges[i].at = 0, OK;
}
int cuMemFree(ptr at) { UNSAFE; return give_up(at, 1); }
int cuIpcGetMemHandle(void *handle, ptr at) {
  UNSAFE;
  int i = slot(at), said[] = {getpid(), ranges[i].fd, (int)ranges[i].size};
  return memset(handle, 0, 64), memcpy(handle, said, sizeof said), OK;
}
struct handle { char said[64]; };
int cuIpcOpenMemHandle(ptr *at, struct handle handle, unsigned flags) {
  UNSAFE;
  int said[3];
  char path[64];
  memcpy(said, handle.said, sizeof said);
  if (said[0] == getpid()) return NO_CONTEXT;
  snprintf(path, sizeof path, "/proc/%d/fd/%d", said[0], said[1]);
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return INVALID_HANDLE;
  *at = (ptr)mmap(NULL, said[2], PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return take(*at, said[2], fd, MAPPED, 0);
}
int cuIpcCloseMemHandle(ptr at) { UNSAFE; return give_up(at, 0); }

int cuMemHostRegister(void *at, size_t size, unsigned flags) {
  UNSAFE;
  const char *gate = getenv("STAND_IN_GATE");
  if (gate) close(open(gate, O_RDONLY));
  if (flags != 1 || slot((ptr)at) >= 0) return INVALID_VALUE;
  for (size_t i = 0; i < size; i += 4096) (void)*((volatile char *)at + i); /* all of it is there */
  return take((ptr)at, size, -1, PINNED, 0);
}
int cuMemHostUnregister(void *at) {
  UNSAFE;
  int i = slot((ptr)at);
  if (i < 0 || ranges[i].state != PINNED) return INVALID_VALUE;
  (void)*(volatile char *)at; /* still mapped */
  return ranges[i].at = 0, OK;
}

struct property { int type, handles, where, device; };
int cuMemGetAllocationGranularity(size_t *size, struct property *wanted, int option) { LOGGED; return *size = GRANULARITY, OK; }
int cuMemCreate(struct allocation **handle, size_t size, struct property *wanted, uint64_t flags) {
  UNSAFE;
  if (size % GRANULARITY || wanted->type != 1 || wanted->handles != 1 || wanted->where != 1) return INVALID_VALUE;
  if (size > FREE_BYTES) return NO_MEMORY;
  *handle = malloc(sizeof **handle);
  (*handle)->fd = shared_memory(size), (*handle)->size = size, (*handle)->dev = wanted->device;
  return OK;
}
int cuMemRelease(struct allocation *handle) { LOGGED; close(handle->fd), free(handle); return OK; }
int cuMemAddressReserve(ptr *at, size_t size, size_t alignment, ptr hint, uint64_t flags) {
  LOGGED;
  *at = (ptr)mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return take(*at, size, -1, RESERVED, 1);
}
int cuMemAddressFree(ptr at, size_t size) {
  LOGGED;
  int i = slot(at);
  return i < 0 || ranges[i].size != size || ranges[i].state != RESERVED ? INVALID_VALUE : give_up(at, 1);
}
int cuMemMap(ptr at, size_t size, size_t offset, struct allocation *handle, uint64_t flags) {
  UNSAFE;
  int i = slot(at);
  if (i < 0 || ranges[i].size != size || ranges[i].state != RESERVED || size > handle->size) return INVALID_VALUE;
  return ranges[i].state = MAPPED,
         mmap((void *)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, handle->fd, 0) == MAP_FAILED ? MAP_FAILED_ : OK;
}
int cuMemUnmap(ptr at, size_t size) {
  LOGGED;
  int i = slot(at);
  if (i < 0 || ranges[i].size != size || ranges[i].state != MAPPED) return INVALID_VALUE;
  ranges[i].state = RESERVED;
  return mmap((void *)at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED ? MAP_FAILED_ : OK;
}
struct access { int where, device, flags; };
int cuMemSetAccess(ptr at, size_t size, struct access *access, size_t count) {
  UNSAFE;
  char name[32];
  snprintf(name, sizeof name, "access of %d", access->device);
  return logged(name), access->flags == 3 && !mprotect((void *)at, size, PROT_READ | PROT_WRITE) ? OK : INVALID_VALUE;
}
int cuMemExportToShareableHandle(int *fd, struct allocation *handle, int kind, uint64_t flags) {
  UNSAFE;
  return *fd = fcntl(handle->fd, F_DUPFD_CLOEXEC, 0), kind == 1 ? OK : INVALID_VALUE;
}
int cuMemImportFromShareableHandle(struct allocation **handle, void *fd, int kind) {
  UNSAFE;
  struct stat status;
  int own = fcntl((int)(intptr_t)fd, F_DUPFD_CLOEXEC, 0);
  if (own < 0 || fstat(own, &status)) return INVALID_HANDLE;
  *handle = malloc(sizeof **handle);
  (*handle)->fd = own, (*handle)->size = status.st_size;
  return OK;
}
