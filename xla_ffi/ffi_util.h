// Small bridges between csrc and XLA's FFI.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <string>
#include <type_traits>

#include "csrc/core/dtype.h"
#include "csrc/core/status.h"
#include "xla/ffi/api/ffi.h"

namespace wideep {

namespace ffi = ::xla::ffi;

inline ffi::Error ToFfiError(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return ffi::Error::Success();
    case Code::kInvalidArgument:
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, status.message());
    case Code::kFailedPrecondition:
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition, status.message());
    case Code::kDeadlineExceeded:
      return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, status.message());
    case Code::kOutOfRange:
      return ffi::Error(ffi::ErrorCode::kOutOfRange, status.message());
    case Code::kInternal:
      break;
  }
  return ffi::Error(ffi::ErrorCode::kInternal, status.message());
}

/// The row type that an FFI element type stands for, if it is one.
inline std::optional<DType> RowDType(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return DType::kF32;
    case ffi::DataType::BF16:
      return DType::kBF16;
    case ffi::DataType::F16:
      return DType::kF16;
    case ffi::DataType::F8E4M3FN:
      return DType::kF8E4M3;
    default:
      return std::nullopt;
  }
}

inline std::string ShapeOf(const ffi::AnyBuffer& buffer) {
  std::string text = "[";
  for (int64_t dim : buffer.dimensions())
    text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

/// A handler, as the capsule that jax.ffi.register_ffi_target expects.
template <typename T>
nanobind::capsule HandlerCapsule(T* handler) {
  static_assert(std::is_invocable_r_v<XLA_FFI_Error*, T, XLA_FFI_CallFrame*>,
                "an FFI handler takes XLA_FFI_CallFrame* and returns XLA_FFI_Error*");
  return nanobind::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace wideep
