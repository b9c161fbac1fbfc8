// A libgdrapi.so.2 for nvshmem_network.sh, over memory of the host. NVSHMEM's UCX transport applies
// signals and atomics on the processor, through GDRCopy's mappings of a GPU's memory. Where
// NVSHMEM's memory is the host's (NVSHMEM_HEAP_KIND=SYSMEM), the processor has it where the GPU has
// it, and a mapping is the memory itself: no kernel module is needed. The interface is GDRCopy's,
// version 2.
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct gdr* gdr_t;
typedef struct {
  unsigned long address;
} gdr_mh_t;
typedef struct {
  uint64_t va;
  uint64_t mapped_size;
  uint32_t page_size;
  uint64_t tm_cycles;
  uint32_t cycles_per_ms;
  unsigned mapped : 1;
  unsigned wc_mapping : 1;
} gdr_info_t;

void gdr_runtime_get_version(int* major, int* minor) {
  *major = 2;
  *minor = 0;
}
int gdr_driver_get_version(gdr_t g, int* major, int* minor) {
  (void)g;
  gdr_runtime_get_version(major, minor);
  return 0;
}
gdr_t gdr_open(void) { return malloc(1); }
int gdr_close(gdr_t g) {
  free(g);
  return 0;
}
int gdr_pin_buffer(gdr_t g, unsigned long address, size_t size, uint64_t token, uint32_t va_space,
                   gdr_mh_t* handle) {
  (void)g, (void)size, (void)token, (void)va_space;
  handle->address = address;
  return 0;
}
int gdr_unpin_buffer(gdr_t g, gdr_mh_t handle) {
  (void)g, (void)handle;
  return 0;
}
int gdr_map(gdr_t g, gdr_mh_t handle, void** va, size_t size) {
  (void)g, (void)size;
  *va = (void*)handle.address;
  return 0;
}
int gdr_unmap(gdr_t g, gdr_mh_t handle, void* va, size_t size) {
  (void)g, (void)handle, (void)va, (void)size;
  return 0;
}
int gdr_get_info(gdr_t g, gdr_mh_t handle, gdr_info_t* info) {
  (void)g;
  memset(info, 0, sizeof(*info));
  info->va = handle.address;
  info->page_size = 65536;
  info->mapped = 1;
  return 0;
}
int gdr_copy_to_mapping(gdr_mh_t handle, void* mapping, const void* from, size_t size) {
  (void)handle;
  memcpy(mapping, from, size);
  return 0;
}
int gdr_copy_from_mapping(gdr_mh_t handle, void* to, const void* mapping, size_t size) {
  (void)handle;
  memcpy(to, mapping, size);
  return 0;
}
