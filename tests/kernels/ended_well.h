// How a case of virtual ranks ended.
#pragma once

#include "csrc/core/error_record.h"
#include "tests/cpp/check.h"
#include "tests/kernels/virtual_ranks.h"

namespace wideep {
namespace testing {

/// After what was launched. False, and a failed check, if the machine failed (`synchronized` is
/// false) or a rank that `runs` gave up.
template <typename Machine, typename Runs>
bool EndedWell(const VirtualRanks<Machine>& ranks, bool synchronized, Runs runs) {
  if (!synchronized) {
    check::Fail(__FILE__, __LINE__, "the machine failed");
    return false;
  }
  const GroupSettings& group = ranks.settings();
  for (int rank = 0; rank < group.num_ranks; ++rank) {
    const ErrorRecord& record = ranks.record(rank);
    if (record.failure == 0 || !runs(rank)) continue;
    check::Fail(__FILE__, __LINE__, Describe(record, group.deadline_s, group.top_k));
    return false;
  }
  return true;
}

}  // namespace testing
}  // namespace wideep
