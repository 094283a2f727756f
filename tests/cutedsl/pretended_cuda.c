/* A CUDA runtime without a GPU, as far as a compiled CuTe DSL kernel asks one: it notes what is launched, and runs nothing. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { uint32_t x, y, z; } dimensions;
typedef struct { dimensions grid, block; size_t shared_bytes; void *stream; void *attributes; uint32_t num_attributes; } launch_config;
typedef struct { uint32_t id; uint32_t padding; uint32_t value[16]; } launch_attribute;

enum { CLUSTER = 4, PROGRAMMATIC = 6 };

struct {
  uint32_t count, grid[3], block[3], cluster[3], programmatic;
  uint64_t stream;
} launched;

static int last_error, next_error;

void pretend_error(int code) { next_error = code; }

int cudaLaunchKernelExC(const launch_config *config, const void *kernel, void **arguments) {
  const launch_attribute *attributes = config->attributes;
  launched.count++;
  memcpy(launched.grid, &config->grid, sizeof launched.grid);
  memcpy(launched.block, &config->block, sizeof launched.block);
  launched.stream = (uint64_t)config->stream;
  launched.programmatic = 0;
  for (int i = 0; i < 3; i++) launched.cluster[i] = 1;
  for (uint32_t i = 0; i < config->num_attributes; i++) {
    if (attributes[i].id == CLUSTER) memcpy(launched.cluster, attributes[i].value, sizeof launched.cluster);
    if (attributes[i].id == PROGRAMMATIC) launched.programmatic = attributes[i].value[0];
  }
  last_error = next_error;
  next_error = 0;
  return last_error;
}

int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cudaFuncSetAttribute(const void *function, int attribute, int value) { return 0; }
int cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) { return 0; }
int cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
  *library = &launched;
  return 0;
}
int cudaLibraryGetKernel(void **kernel, void *library, const char *name) { *kernel = &launched; return 0; }
int cudaLibraryUnload(void *library) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaGetLastError(void) { return last_error; }
const char *cudaGetErrorName(int code) { return "pretended"; }
const char *cudaGetErrorString(int code) { return "pretended"; }
static int nothing(void) { return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
  *function = (void *)nothing;
  if (status) *status = 0;
  return 0;
}
