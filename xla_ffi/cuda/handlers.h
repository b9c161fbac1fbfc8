// The CUDA backend's handlers; each is defined in the file of its op.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* WideepPlan(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepDispatch(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepDispatchGrad(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepCombine(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepCombineGrad(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepQuantizeRows(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepLowLatencyDispatch(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepLowLatencyDispatchSend(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepLowLatencyDispatchRecv(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepLowLatencyCombine(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepLowLatencyCombineSend(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepLowLatencyCombineRecv(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepLowLatencyCombineGrad(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepGroupedMatmul(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepGroupedMatmulWeightGrad(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepSwiglu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepSwigluGrad(XLA_FFI_CallFrame* call_frame);
}
