// Element types of rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/core/host_device.h"

namespace wideep {

enum class DType : uint8_t { kF32, kBF16, kF16, kF8E4M3 };

WIDEEP_HOST_DEVICE constexpr size_t SizeOf(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kF8E4M3 ? 1 : 2;
}

}  // namespace wideep
