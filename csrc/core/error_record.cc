#include "csrc/core/error_record.h"

#include <sstream>

namespace wideep {
namespace {

const char* NameOf(ExchangeOp op) {
  switch (op) {
    case ExchangeOp::kPlan:
      return "make_plan";
    case ExchangeOp::kDispatch:
      return "dispatch";
    case ExchangeOp::kDispatchGrad:
      return "dispatch's gradient";
    case ExchangeOp::kCombine:
      return "combine";
    case ExchangeOp::kCombineGrad:
      return "combine's gradient";
    case ExchangeOp::kLowLatencyDispatch:
      return "ll_dispatch";
    case ExchangeOp::kLowLatencyCombine:
      return "ll_combine";
    case ExchangeOp::kLowLatencyCombineGrad:
      return "ll_combine's gradient";
    case ExchangeOp::kNone:
      break;
  }
  return "an exchange";
}

const char* NameOf(Phase phase) {
  switch (phase) {
    case Phase::kPublished:
      return "to start";
    case Phase::kCounts:
      return "to send its counts";
    case Phase::kAccepted:
      return "to send its counts after capacity";
    case Phase::kBlocks:
      return "for the blocks of its own kernel";
    case Phase::kRingTail:
      return "to put a token into a ring";
    case Phase::kRingHead:
      return "to take a token out of a ring";
    case Phase::kDone:
      return "to finish";
    case Phase::kRegion:
      return "to send its rows";
    case Phase::kSlots:
      return "to send its expert outputs";
    case Phase::kSums:
      return "to sum its rows";
    case Phase::kNone:
      break;
  }
  return "for a peer";
}

}  // namespace

std::string Describe(const ErrorRecord& record, double deadline_s, int top_k) {
  std::ostringstream text;
  const auto op = static_cast<ExchangeOp>(record.op);
  const auto phase = static_cast<Phase>(record.phase);
  const bool values_known = record.reporter == record.rank;
  const auto got = static_cast<int32_t>(record.got);
  text << NameOf(op) << ": ";
  switch (static_cast<Failure>(record.failure)) {
    case Failure::kIndexRange:
      text << "topk_idx out of range on rank " << record.reporter;
      if (values_known) {
        text << ": got " << got << " at token " << record.expected / top_k << ", k "
             << record.expected % top_k;
      }
      text << ". Indices lie in [-1, num_experts); use -1 for a masked selection";
      break;
    case Failure::kRepeatedExpert:
      text << "topk_idx selects an expert twice in a token on rank " << record.reporter;
      if (values_known) text << ": expert " << got << " in token " << record.expected / top_k;
      text << ". Select distinct experts, or mask one with -1";
      break;
    case Failure::kOverflow:
      text << "rank " << record.reporter << " is sent more rows than its capacity";
      if (values_known) text << ": " << record.got << " rows, capacity " << record.expected;
      text << ". Raise capacity, leave it None (no drops), or use overflow='drop'";
      break;
    case Failure::kForeignRows:
      text << "recv does not belong to this call on rank " << record.reporter;
      if (values_known) {
        text << ": it holds " << got << ", expected [0, " << record.expected << ")";
      }
      text << ". Pass what ll_dispatch returned for these tokens";
      break;
    case Failure::kNotMapped:
      text << "some buffers on the node of rank " << record.reporter
           << " cannot be mapped by its other ranks, as an exchange between nodes needs. Use "
              "zero_copy='auto', and memory of XLA that can be mapped";
      break;
    case Failure::kDeadline:
    case Failure::kNone:
      text << "rank " << record.reporter << " waited longer than the deadline of " << deadline_s
           << " s ";
      if (phase == Phase::kBlocks) {
        text << "for the blocks of its own kernel. Lower num_sms on the ExpertGroup, so that the "
                "blocks of all ranks fit on the GPU together";
      } else {
        text << "for rank " << record.peer << " " << NameOf(phase)
             << ". Every rank of the group must run every exchange, in the same order; look at "
                "what that rank did instead, or raise deadline_s on the ExpertGroup";
      }
      break;
  }
  text << ". The group cannot be used any more: close it and make a new one, or mask ranks that "
          "are gone (mask_ranks)";
  return text.str();
}

}  // namespace wideep
