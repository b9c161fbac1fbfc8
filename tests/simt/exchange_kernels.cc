// The exchange kernels and their launchers, for the host compiler.
#include "csrc/ep/combine.cu"
#include "csrc/ep/dispatch.cu"
#include "csrc/ep/plan.cu"
