// Which variant of the row kernels runs here.
#include <cstdlib>
#include <cstring>

#include "csrc/ep/row_kernels.h"

namespace wideep {

extern const RowKernels kRowKernels_portable;
#if defined(WIDEEP_X86_VARIANTS)
extern const RowKernels kRowKernels_v3;
extern const RowKernels kRowKernels_v4;
#endif

int ListRowKernels(const RowKernels** variants, int max_variants) {
  int count = 0;
  const auto add = [&](const RowKernels& kernels) {
    if (count < max_variants) variants[count++] = &kernels;
  };
  add(kRowKernels_portable);
#if defined(WIDEEP_X86_VARIANTS)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("fma");
  if (v3) add(kRowKernels_v3);
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) add(kRowKernels_v4);
#endif
  return count;
}

const RowKernels& SelectRowKernels() {
  static const RowKernels* const selected = [] {
    const RowKernels* variants[3];
    const int count = ListRowKernels(variants, 3);
    if (const char* wanted = std::getenv("WIDEEP_ISA")) {
      for (int i = 0; i < count; ++i) {
        if (std::strcmp(variants[i]->isa, wanted) == 0) return variants[i];
      }
    }
    return variants[count - 1];
  }();
  return *selected;
}

}  // namespace wideep
