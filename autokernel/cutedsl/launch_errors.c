/* The one function that NVIDIA's static runtime library lacks of those that compiled CuTe DSL kernels call.

   libcuda_dialect_runtime_static.a has everything else, so that a kernel linked with it and with this file needs only
   libtvm_ffi and the CUDA runtime. The function exists in libcute_dsl_runtime.so alone, a library of the compiler's package,
   which production does not have. It is called when a launch has failed, to raise that as an exception in Python. */

#include <stdint.h>
#include <stdio.h>

typedef void (*raise_fn)(const char *kind, const char **parts, int32_t num_parts);

void CuteDSLRT_TVMFFISetRaisedCudaError(raise_fn raise, int32_t code) {
  char text[96];
  snprintf(text, sizeof text, "a compiled CuTe DSL kernel did not launch: CUDA error %d", (int)code);
  const char *parts[] = {text};
  raise("RuntimeError", parts, 1);
}
