// Functions that kernels and the host both call.
#pragma once

#if defined(__CUDACC__)
#define WIDEEP_HOST_DEVICE __host__ __device__
#else
#define WIDEEP_HOST_DEVICE
#endif
