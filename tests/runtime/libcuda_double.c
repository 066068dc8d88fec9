/* A double of libcuda for tests: it launches nothing and notes everything. Functions that begin with double_ are asked
 * by the tests; those that begin with cu are what the library under test calls. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAMES = 32, LAUNCHES = 4096, ARGUMENTS = 160 };

typedef struct {
  uint32_t grid[3], block[3], shared;
  void* stream;
  void* context;
  char name[64];
  int count;
  uint64_t values[ARGUMENTS];
} Launch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Launch launches[LAUNCHES];
static long launched, loaded, unloaded, calls;
static char failing[64];
static int failing_code, version = 13000, capability = 90, shared_limit = 232448, multiprocessors = 132;
static long failing_after;
static struct { char name[64]; char kinds[ARGUMENTS + 1]; } entries[NAMES];
static int entry_count;
static int dynamic_shared[NAMES];
static __thread void* current;
static void* everybodys = (void*)0xC0;

void double_reset(void) {
  pthread_mutex_lock(&lock);
  launched = loaded = unloaded = calls = 0;
  failing[0] = 0;
  failing_after = 0;
  version = 13000; capability = 90; shared_limit = 232448; multiprocessors = 132;
  entry_count = 0;
  memset(dynamic_shared, 0, sizeof dynamic_shared);
  everybodys = (void*)0xC0;
  current = 0;
  pthread_mutex_unlock(&lock);
}
/* `kinds`: a letter for each parameter of the function `name`: p pointer, i int32. */
void double_entry(const char* name, const char* kinds) {
  snprintf(entries[entry_count].name, 64, "%s", name);
  snprintf(entries[entry_count++].kinds, ARGUMENTS + 1, "%s", kinds);
}
/* `name` gives `code` from its call number `after` on. */
void double_fail(const char* name, int code, long after) {
  snprintf(failing, sizeof failing, "%s", name);
  failing_code = code;
  failing_after = after;
}
void double_device(int cc, int shared, int sms, int cuda) {
  capability = cc; shared_limit = shared; multiprocessors = sms; version = cuda;
}
void double_current(void* everybody, void* mine) { everybodys = everybody; current = mine; }
long double_launched(void) { return launched; }
long double_loaded(void) { return loaded; }
long double_unloaded(void) { return unloaded; }
int double_dynamic_shared(int entry) { return dynamic_shared[entry]; }
const Launch* double_launch(long i) { return &launches[i % LAUNCHES]; }

static int fails(const char* name) {
  __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
  if (!failing[0] || strcmp(name, failing) != 0) return 0;
  return failing_after-- > 0 ? 0 : failing_code;
}
#define FAIL(name) do { int code = fails(name); if (code) return code; } while (0)

int cuInit(unsigned flags) { (void)flags; FAIL("cuInit"); return 0; }
int cuDriverGetVersion(int* out) { FAIL("cuDriverGetVersion"); *out = version; return 0; }
int cuCtxGetCurrent(void** out) { FAIL("cuCtxGetCurrent"); *out = current ? current : everybodys; return 0; }
int cuCtxSetCurrent(void* context) { FAIL("cuCtxSetCurrent"); current = context; return 0; }
int cuCtxPushCurrent_v2(void* context) { (void)context; FAIL("cuCtxPushCurrent_v2"); return 0; }
int cuCtxPopCurrent_v2(void** out) { FAIL("cuCtxPopCurrent_v2"); *out = 0; return 0; }
int cuCtxGetId(void* context, unsigned long long* out) { FAIL("cuCtxGetId"); *out = (uintptr_t)context; return 0; }
int cuCtxSynchronize(void) { FAIL("cuCtxSynchronize"); return 0; }
int cuCtxGetDevice(int* out) { FAIL("cuCtxGetDevice"); *out = 0; return 0; }
int cuDeviceGetAttribute(int* out, int which, int device) {
  (void)device;
  FAIL("cuDeviceGetAttribute");
  *out = which == 16 ? multiprocessors : which == 75 ? capability / 10 : which == 76 ? capability % 10 : shared_limit;
  return 0;
}
int cuModuleLoadDataEx(void** out, const void* code, unsigned count, int* options, void** values) {
  (void)code; (void)options;
  FAIL("cuModuleLoadDataEx");
  if (count != 2 || !values[0]) return 1;
  *out = malloc(16); /* so that a leak checker sees modules that are not unloaded */
  __atomic_add_fetch(&loaded, 1, __ATOMIC_RELAXED);
  return 0;
}
int cuModuleUnload(void* module) { FAIL("cuModuleUnload"); free(module); __atomic_add_fetch(&unloaded, 1, __ATOMIC_RELAXED); return 0; }
int cuModuleGetFunction(void** out, void* module, const char* name) {
  (void)module;
  FAIL("cuModuleGetFunction");
  for (int i = 0; i < entry_count; i++)
    if (!strcmp(entries[i].name, name)) { *out = (void*)(uintptr_t)(i + 1); return 0; }
  return 500;
}
int cuFuncSetAttribute(void* function, int which, int value) {
  FAIL("cuFuncSetAttribute");
  if (which != 8) return 1;
  dynamic_shared[(uintptr_t)function - 1] = value;
  return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  FAIL("cuLaunchKernel");
  if (extra) return 1;
  const int entry = (int)((uintptr_t)function - 1);
  pthread_mutex_lock(&lock);
  Launch* out = &launches[launched++ % LAUNCHES];
  pthread_mutex_unlock(&lock);
  out->grid[0] = gx; out->grid[1] = gy; out->grid[2] = gz;
  out->block[0] = bx; out->block[1] = by; out->block[2] = bz;
  out->shared = shared; out->stream = stream; out->context = current ? current : everybodys;
  snprintf(out->name, sizeof out->name, "%s", entries[entry].name);
  out->count = (int)strlen(entries[entry].kinds);
  for (int i = 0; i < out->count; i++) {
    if (entries[entry].kinds[i] == 'p') memcpy(&out->values[i], parameters[i], 8);
    else { int32_t number; memcpy(&number, parameters[i], 4); out->values[i] = (uint64_t)(int64_t)number; }
  }
  return 0;
}
int cuGetErrorName(int code, const char** out) {
  switch (code) {
    case 2: *out = "CUDA_ERROR_OUT_OF_MEMORY"; return 0;
    case 200: *out = "CUDA_ERROR_INVALID_IMAGE"; return 0;
    case 209: *out = "CUDA_ERROR_NO_BINARY_FOR_GPU"; return 0;
    case 222: *out = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"; return 0;
    case 500: *out = "CUDA_ERROR_NOT_FOUND"; return 0;
  }
  *out = 0;
  return 1;
}
int cuGetErrorString(int code, const char** out) {
  if (code == 209) { *out = "no kernel image is available"; return 0; }
  *out = 0;
  return 1;
}
