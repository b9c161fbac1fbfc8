// Loads every exchange kernel on the current device, before the first of them runs; see LoadKernel
// in csrc/core/launch.cuh.
#pragma once

#include "csrc/core/status.h"

namespace wideep {

// Each in the file of its kernels.
Status LoadPlanKernels();
Status LoadDispatchKernels();
Status LoadCombineKernels();
Status LoadQuantizeKernels();
Status LoadLowLatencyKernels();

inline Status LoadExchangeKernels() {
  for (const auto load : {LoadPlanKernels, LoadDispatchKernels, LoadCombineKernels,
                          LoadQuantizeKernels, LoadLowLatencyKernels}) {
    if (Status status = load(); !status.ok()) return status;
  }
  return Status();
}

}  // namespace wideep
