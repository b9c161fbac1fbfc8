// The few types of the CUDA runtime that csrc/ep names outside of kernels.
#pragma once

struct CUstream_st;
using cudaStream_t = CUstream_st*;
