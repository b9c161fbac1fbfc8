// How the handlers of csrc/gemm read rows in groups.
#pragma once

#include <string>

#include "csrc/gemm/grouped_matmul.h"
#include "xla_ffi/ffi_util.h"

namespace wideep {

using I32Vector = ffi::BufferR1<ffi::S32>;

/// rows: [m, columns] or [groups, cap, columns].
inline Status ReadRowGroups(const char* op, const char* name, const ffi::AnyBuffer& rows,
                            const I32Vector& group_sizes, RowGroups& groups) {
  const auto dims = rows.dimensions();
  groups.group_sizes = group_sizes.typed_data();
  groups.num_groups = group_sizes.dimensions()[0];
  if (dims.size() == 3 && dims[0] == groups.num_groups) {
    groups.slab_rows = dims[1];
    groups.num_rows = dims[0] * dims[1];
    return Status();
  }
  if (dims.size() == 2) {
    groups.num_rows = dims[0];
    return Status();
  }
  return Status::InvalidArgument(std::string(op) + ": " + name + " must be [m, columns] or [" +
                                 std::to_string(groups.num_groups) + ", cap, columns], got " +
                                 ShapeOf(rows));
}

}  // namespace wideep
