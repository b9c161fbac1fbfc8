// The CPU backend's handlers; each is defined in the file of its op.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* WideepInstantiateOp(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepPlan(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepDispatch(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepDispatchGrad(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepCombine(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepCombineGrad(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepQuantize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepLowLatencyDispatch(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepLowLatencyCombine(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* WideepLowLatencyCombineGrad(XLA_FFI_CallFrame* call_frame);
}
