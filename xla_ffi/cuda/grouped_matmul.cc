// Handlers of the grouped matrix product and of its weight gradient.
//
// The workspace is a result, not scratch memory of the handler: a captured command buffer keeps its
// address.
#include "csrc/gemm/grouped_matmul.h"

#include <cuda_runtime_api.h>

#include <string>

#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/row_groups.h"
#include "xla_ffi/ffi_util.h"

namespace wideep {
namespace {

using Bytes = ffi::BufferR1<ffi::U8>;

Status CheckWorkspace(const char* op, const RowGroups& groups, const Bytes& workspace) {
  const size_t needed = GroupedMatmulWorkspaceBytes(groups.num_groups);
  if (workspace.size_bytes() >= needed) return Status();
  return Status::InvalidArgument(std::string(op) + ": workspace must have " +
                                 std::to_string(needed) + " bytes, got " +
                                 std::to_string(workspace.size_bytes()));
}

Status ReadTypes(const char* op, const ffi::AnyBuffer& a, const ffi::AnyBuffer& b,
                 const ffi::AnyBuffer& out, DType& dtype, DType& out_dtype) {
  const std::optional<DType> operand_type = RowDType(a.element_type());
  const std::optional<DType> out_type = RowDType(out.element_type());
  if (!operand_type || !out_type || a.element_type() != b.element_type()) {
    return Status::InvalidArgument(std::string(op) +
                                   ": operands must be of one type, bfloat16 or float16");
  }
  dtype = *operand_type;
  out_dtype = *out_type;
  return Status();
}

ffi::Error GroupedMatmulImpl(cudaStream_t stream, bool transpose_w, bool zero_tail,
                             ffi::AnyBuffer rows, ffi::AnyBuffer w, I32Vector group_sizes,
                             ffi::Result<ffi::AnyBuffer> out, ffi::Result<Bytes> workspace) {
  constexpr char kOp[] = "grouped_matmul";
  GroupedMatmulParams p;
  Status status = ReadRowGroups(kOp, "rows", rows, group_sizes, p.groups);
  if (status.ok()) status = CheckWorkspace(kOp, p.groups, *workspace);
  if (status.ok()) status = ReadTypes(kOp, rows, w, *out, p.dtype, p.out_dtype);
  if (!status.ok()) return ToFfiError(status);
  const auto w_dims = w.dimensions();
  if (w_dims.size() != 3 || w_dims[0] != p.groups.num_groups ||
      w_dims[transpose_w ? 2 : 1] != rows.dimensions().back()) {
    return ffi::Error::InvalidArgument(std::string(kOp) +
                                       ": w must be [groups, k, n] and fit rows " + ShapeOf(rows) +
                                       ", got " + ShapeOf(w));
  }
  p.k = w_dims[1];
  p.n = w_dims[2];
  const int64_t out_elements = p.groups.num_rows * (transpose_w ? p.k : p.n);
  if (static_cast<int64_t>(out->element_count()) != out_elements) {
    return ffi::Error::InvalidArgument(std::string(kOp) + ": out does not fit rows " +
                                       ShapeOf(rows) + " and w " + ShapeOf(w) + ", got " +
                                       ShapeOf(*out));
  }
  p.transpose_w = transpose_w;
  p.zero_tail = zero_tail;
  p.rows = rows.untyped_data();
  p.w = w.untyped_data();
  p.out = out->untyped_data();
  p.workspace = workspace->untyped_data();
  return ToFfiError(LaunchGroupedMatmul(p, stream));
}

ffi::Error GroupedMatmulWeightGradImpl(cudaStream_t stream, ffi::AnyBuffer rows,
                                       ffi::AnyBuffer dout, I32Vector group_sizes,
                                       ffi::Result<ffi::AnyBuffer> dw,
                                       ffi::Result<Bytes> workspace) {
  constexpr char kOp[] = "grouped_matmul's weight gradient";
  GroupedMatmulWeightGradParams p;
  RowGroups dout_groups;
  Status status = ReadRowGroups(kOp, "rows", rows, group_sizes, p.groups);
  if (status.ok()) status = ReadRowGroups(kOp, "dout", dout, group_sizes, dout_groups);
  if (status.ok()) status = CheckWorkspace(kOp, p.groups, *workspace);
  if (status.ok()) status = ReadTypes(kOp, rows, dout, *dw, p.dtype, p.out_dtype);
  if (!status.ok()) return ToFfiError(status);
  p.k = rows.dimensions().back();
  p.n = dout.dimensions().back();
  const auto dw_dims = dw->dimensions();
  if (dout_groups.num_rows != p.groups.num_rows || dout_groups.slab_rows != p.groups.slab_rows ||
      dw_dims.size() != 3 || dw_dims[0] != p.groups.num_groups || dw_dims[1] != p.k ||
      dw_dims[2] != p.n) {
    return ffi::Error::InvalidArgument(std::string(kOp) + ": rows " + ShapeOf(rows) + ", dout " +
                                       ShapeOf(dout) + " and dw " + ShapeOf(*dw) +
                                       " do not fit each other");
  }
  p.rows = rows.untyped_data();
  p.dout = dout.untyped_data();
  p.dw = dw->untyped_data();
  p.workspace = workspace->untyped_data();
  return ToFfiError(LaunchGroupedMatmulWeightGrad(p, stream));
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepGroupedMatmul, wideep::GroupedMatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Attr<bool>("transpose_w")
                                  .Attr<bool>("zero_tail")
                                  .Arg<xla::ffi::AnyBuffer>()  // rows [m, d] or [groups, cap, d]
                                  .Arg<xla::ffi::AnyBuffer>()  // w [groups, k, n]
                                  .Arg<wideep::I32Vector>()    // group_sizes [groups]
                                  .Ret<xla::ffi::AnyBuffer>()  // out: rows with n or k columns
                                  .Ret<wideep::Bytes>(),       // workspace
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepGroupedMatmulWeightGrad, wideep::GroupedMatmulWeightGradImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // rows [m, k] or [groups, cap, k]
                                  .Arg<xla::ffi::AnyBuffer>()  // dout [m, n] or [groups, cap, n]
                                  .Arg<wideep::I32Vector>()    // group_sizes [groups]
                                  .Ret<xla::ffi::AnyBuffer>()  // dw [groups, k, n]
                                  .Ret<wideep::Bytes>(),       // workspace
                              {xla::ffi::Traits::kCmdBufferCompatible});
