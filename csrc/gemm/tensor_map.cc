#include "csrc/gemm/tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

namespace wideep {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* base,
                                 const cuuint64_t* sizes, const cuuint64_t* strides_bytes,
                                 const cuuint32_t* box, const cuuint32_t* element_strides,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

EncodeTiled FindEncodeTiled() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<EncodeTiled>(entry)
             : nullptr;
}

CUtensorMapDataType TypeOf(DType dtype) {
  return dtype == DType::kF32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
         : dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

}  // namespace

Status EncodeTensorMap(const TensorMapShape& shape, CUtensorMap* map) {
  static const EncodeTiled encode_tiled = FindEncodeTiled();
  if (encode_tiled == nullptr) {
    return Status::FailedPrecondition(
        "tensor map: the CUDA driver has no cuTensorMapEncodeTiled; 12.0 or newer is needed");
  }
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(shape.x) * SizeOf(shape.dtype);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(shape.x), static_cast<cuuint64_t>(shape.y),
                              static_cast<cuuint64_t>(shape.z)};
  const cuuint64_t strides_bytes[] = {row_bytes, row_bytes * sizes[1]};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / SizeOf(shape.dtype)),
                            static_cast<cuuint32_t>(shape.box_y), 1};
  const cuuint32_t element_strides[] = {1, 1, 1};
  const CUresult result =
      encode_tiled(map, TypeOf(shape.dtype), shape.three_dimensional ? 3 : 2,
                   const_cast<void*>(shape.base), sizes, strides_bytes, box, element_strides,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status();
  return Status::InvalidArgument("tensor map: [" + std::to_string(shape.z) + ", " +
                                 std::to_string(shape.y) + ", " + std::to_string(shape.x) +
                                 "]: driver error " + std::to_string(result));
}

}  // namespace wideep
