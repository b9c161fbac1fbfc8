// Tensor maps: what the copy engine is told about an array.
#pragma once

#include <cuda.h>  // types only: the driver library is not linked

#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/status.h"

namespace wideep {

/// A dense array of up to three dimensions, innermost first; a dimension that is not there is 1.
struct TensorMapShape {
  const void* base;
  DType dtype;
  int64_t x, y, z;
  /// A box is 128 bytes wide, box_y rows, one plane.
  int32_t box_y;
  /// Whether coordinates have a z.
  bool three_dimensional;
};

/// The map for copies in the 128-byte swizzle; what lies outside of the array reads as zero and is
/// not written.
Status EncodeTensorMap(const TensorMapShape& shape, CUtensorMap* map);

}  // namespace wideep
