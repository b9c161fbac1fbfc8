// The low-latency kernels and their launchers, for the host compiler.
#include "csrc/ep/low_latency.cu"
#include "csrc/ep/quantize.cu"
