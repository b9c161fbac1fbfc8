// Ranges that Nsight Systems shows under the domain "jax_wideep".
#pragma once

#include "xla/ffi/api/c_api.h"

#if __has_include(<nvtx3/nvtx3.hpp>)
#include <nvtx3/nvtx3.hpp>
#define WIDEEP_HAS_NVTX 1
#endif

namespace wideep {

#ifdef WIDEEP_HAS_NVTX
struct ProfileDomain {
  static constexpr char const* name{"jax_wideep"};
};
/// Covers its scope. Without a profiler it costs a test of a pointer.
using ProfileRange = nvtx3::scoped_range_in<ProfileDomain>;
#else
struct ProfileRange {
  explicit ProfileRange(const char*) {}
};
#endif

/// `handler` inside a range that bears the name of its FFI target: the host's side of the call, to
/// which Nsight Systems relates the kernels that it enqueues.
template <XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)>
struct Profiled {
  static inline const char* target = "";

  static XLA_FFI_Error* Call(XLA_FFI_CallFrame* call_frame) {
    const ProfileRange range{target};
    return handler(call_frame);
  }
};

}  // namespace wideep
