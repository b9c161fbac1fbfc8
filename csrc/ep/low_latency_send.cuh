// The sending half of low-latency dispatch, also of combine's gradient: each token of this rank to
// the ranks (or the experts) that it selects.
//
// A warp takes a piece of a token, converts it once and stores it everywhere it goes. Where that
// is, every block finds for itself: a bit for each (expert, token) of the rank, so that a row's
// place is the number of bits before it.
#pragma once

#include "csrc/ep/low_latency_protocol.cuh"
#include "csrc/ep/quantize.cuh"

namespace wideep {

/// What is sent, and whose.
struct LowLatencySource {
  LowLatencyTokens tokens;
  int32_t pieces;
  const char* x;
  const int32_t* topk_idx;
  const float* topk_weights;  // go with the rows, or null
};

/// Which tokens select which expert, and which go to which rank; in shared memory.
class TokenBits {
 public:
  WIDEEP_HOST_DEVICE static constexpr int64_t NumWords(const LowLatencyTokens& t, int num_ranks) {
    return (t.num_experts + int64_t{num_ranks}) * ((t.num_tokens + 31) / 32);
  }
  __device__ TokenBits(uint32_t* words, const LowLatencyTokens& t, int num_ranks)
      : words_(words),
        words_per_list_(static_cast<int>((t.num_tokens + 31) / 32)),
        num_experts_(t.num_experts),
        num_words_(static_cast<int>(NumWords(t, num_ranks))) {}

  __device__ void Clear() {
    for (int i = threadIdx.x; i < num_words_; i += blockDim.x) words_[i] = 0;
  }
  /// Returns whether the token already selects the expert.
  __device__ bool Add(int expert, int dst, int token) {
    const uint32_t bit = 1u << token % 32;
    atomicOr(&words_[(num_experts_ + dst) * words_per_list_ + token / 32], bit);
    return (atomicOr(&words_[expert * words_per_list_ + token / 32], bit) & bit) != 0;
  }
  /// Tokens before `token` that select the expert.
  __device__ int Before(int expert, int token) const {
    const uint32_t* words = words_ + expert * words_per_list_;
    int count = __popc(words[token / 32] & ((1u << token % 32) - 1));
    for (int i = 0; i < token / 32; ++i) count += __popc(words[i]);
    return count;
  }
  __device__ int BeforeAtRank(int dst, int token) const {
    return Before(num_experts_ + dst, token);
  }
  __device__ int Count(int expert) const {
    int count = 0;
    for (int i = 0; i < words_per_list_; ++i) count += __popc(words_[expert * words_per_list_ + i]);
    return count;
  }
  __device__ int CountAtRank(int dst) const { return Count(num_experts_ + dst); }

 private:
  uint32_t* const words_;
  const int words_per_list_;
  const int num_experts_;
  const int num_words_;
};

/// Units of 16 bytes of a row that a warp has read, each lane its share.
constexpr int kSendInFlight = 8;
struct PieceBits {
  int4 units[kSendInFlight];

  /// Units `at`, `at` + 32, .. below `end`; zeros past it.
  __device__ __forceinline__ void Read(const char* from, int at, int end) {
#pragma unroll
    for (int i = 0; i < kSendInFlight; ++i) {
      units[i] = make_int4(0, 0, 0, 0);
      if (at + 32 * i < end) units[i] = ptx::ld_global_no_allocate_v4(from + (at + 32 * i) * 16);
    }
  }
};

__device__ __forceinline__ char* RowOfLane(char* row, int lane) {
  return reinterpret_cast<char*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(row), lane));
}

/// Sends units [range.begin, range.end) of a token to the row of every lane in `leaders`, as they
/// are or as FP8 with scales after the values. `bits` holds the first units.
template <DType kDType, bool kQuantize>
__device__ __forceinline__ void SendPiece(const char* from, PieceBits& bits, PieceRange range,
                                          int hidden, char* row, uint32_t leaders) {
  constexpr int kLanes = kLanesPerBlock<kDType>;
  constexpr int kElems = kVectorElems<kDType>;
  const int lane = threadIdx.x % 32;
  for (int first = range.begin; first < range.end; first += 32 * kSendInFlight) {
    const int at = first + lane;
    if (first > range.begin) bits.Read(from, at, range.end);
    if constexpr (!kQuantize) {
      for (uint32_t left = leaders; left != 0; left &= left - 1) {
        char* const to = RowOfLane(row, __ffs(left) - 1);
#pragma unroll
        for (int i = 0; i < kSendInFlight; ++i) {
          if (at + 32 * i < range.end) ptx::st_global_v4(to + (at + 32 * i) * 16, bits.units[i]);
        }
      }
    } else {
      // Several units side by side: each is a chain of exchanges between lanes.
      constexpr int kTogether = 4;
#pragma unroll
      for (int i = 0; i < kSendInFlight; i += kTogether) {
        if (first + 32 * i >= range.end) break;
        const QuantizedPiece<kDType> quantized[kTogether] = {
            QuantizedPiece<kDType>(bits.units[i]), QuantizedPiece<kDType>(bits.units[i + 1]),
            QuantizedPiece<kDType>(bits.units[i + 2]), QuantizedPiece<kDType>(bits.units[i + 3])};
        for (uint32_t left = leaders; left != 0; left &= left - 1) {
          char* const to = RowOfLane(row, __ffs(left) - 1);
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            const int unit = at + 32 * (i + j);
            if (unit >= range.end) continue;
            quantized[j].Store(to + unit * kElems);
            if (unit % kLanes == 0) {
              reinterpret_cast<float*>(to + hidden)[unit / kLanes] = quantized[j].scale;
            }
          }
        }
      }
    }
  }
}

/// The sending half; all threads of the block, right after Begin. A rank that finds a wrong index
/// gives up.
template <DType kDType, bool kQuantize>
__device__ void SendTokens(const LowLatencySource& source, LowLatencyCall& call, int32_t* experts,
                           uint32_t* bit_words) {
  const LowLatencyTokens& t = source.tokens;
  const LowLatencyLayout& layout = call.layout();
  const int lane = threadIdx.x % 32;
  const int num_ranks = call.num_ranks();
  const int local_experts = t.num_experts / num_ranks;
  const auto selections = static_cast<int>(t.num_tokens * t.top_k);
  const bool once = layout.once_per_rank;
  TokenBits bits(bit_words, t, num_ranks);

  // Units of a row in pieces; of quantised rows, whole blocks of 128 values.
  const auto hidden = static_cast<int>(t.hidden);
  const int64_t row_bytes = t.hidden * static_cast<int64_t>(SizeOf(kDType));
  constexpr int kStep = kQuantize ? kLanesPerBlock<kDType> : 1;
  const auto range_of = [&](int piece) {
    const PieceRange range =
        RangeOfPiece(static_cast<int>(row_bytes / 16) / kStep, piece, source.pieces);
    return PieceRange{range.begin * kStep, range.end * kStep};
  };
  // This warp's first piece, early: where it goes turns out while it comes.
  PieceBits piece_bits;
  const auto num_items = static_cast<int32_t>(t.num_tokens * source.pieces);
  int32_t read_item = FirstItem();
  const auto read = [&](int32_t item) {
    const PieceRange range = range_of(item % source.pieces);
    piece_bits.Read(source.x + item / source.pieces * row_bytes, range.begin + lane, range.end);
    read_item = item;
  };
  if (read_item < num_items) read(read_item);

  int32_t next = static_cast<int>(threadIdx.x) < selections ? source.topk_idx[threadIdx.x] : -1;
  bits.Clear();
  if (!call.Meet()) return;
  for (int s = threadIdx.x; s < selections; s += blockDim.x) {
    int32_t expert = next;
    if (s + static_cast<int>(blockDim.x) < selections) next = source.topk_idx[s + blockDim.x];
    if (expert < -1 || expert >= t.num_experts) {
      call.exchange().Fail(Failure::kIndexRange, Phase::kNone, call.rank(), s,
                           static_cast<uint32_t>(expert));
      call.GiveUp();
      expert = -1;
    }
    if (expert >= 0 && call.IsMasked(expert / local_experts)) expert = -1;
    experts[s] = expert;
    if (expert >= 0 && bits.Add(expert, expert / local_experts, s / t.top_k)) {
      call.exchange().Fail(Failure::kRepeatedExpert, Phase::kNone, call.rank(), s, expert);
      call.GiveUp();
    }
  }
  if (!call.Meet()) return;
  call.CountCall();

  const int thread = static_cast<int>(threadIdx.x * gridDim.x + blockIdx.x);
  const int num_threads = static_cast<int>(gridDim.x * blockDim.x);
  for (int expert = thread; expert < t.num_experts; expert += num_threads) {
    const int dst = expert / local_experts;
    if (call.IsMasked(dst)) continue;
    auto* counts = call.In<uint64_t>(dst, layout.expert_counts);
    ptx::st_relaxed_sys_u64(&counts[expert % local_experts * num_ranks + call.rank()],
                            CountWord::Pack(call.epoch(), bits.Count(expert)));
  }
  if (once) {
    for (int dst = thread; dst < num_ranks; dst += num_threads) {
      if (call.IsMasked(dst)) continue;
      ptx::st_relaxed_sys_u64(&call.In<uint64_t>(dst, layout.token_counts)[call.rank()],
                              CountWord::Pack(call.epoch(), bits.CountAtRank(dst)));
    }
  }

  ForEachItem(num_items, [&](int32_t item) {
    if (item != read_item) read(item);
    const int token = item / source.pieces;
    const int piece = item % source.pieces;
    const int32_t selection = token * t.top_k + lane;
    const int32_t expert = lane < t.top_k ? experts[selection] : -1;
    const int dst = expert >= 0 ? expert / local_experts : -1;
    const uint32_t together = once ? __match_any_sync(~0u, dst) : 1u << lane;
    const bool leads = expert >= 0 && lane == __ffs(together) - 1;
    char* row = nullptr;
    uint64_t* flag = nullptr;
    if (expert >= 0) {
      const int local_expert = expert % local_experts;
      const int place = bits.Before(expert, token);
      const int64_t slot =
          once ? call.rank() * layout.chunk + bits.BeforeAtRank(dst, token)
               : (int64_t{local_expert} * num_ranks + call.rank()) * layout.chunk + place;
      const int64_t slot_piece = slot * kMaxPieces + piece;
      row = call.In<char>(dst, layout.arrival_rows) + slot * layout.row_stride;
      flag = call.In<uint64_t>(dst, layout.arrival_flags) + slot_piece;
      const int index = __popc(together & ((1u << lane) - 1));
      const float weight = source.topk_weights != nullptr ? source.topk_weights[selection] : 0.0f;
      auto* entries = call.In<ArrivalEntry>(dst, layout.arrival_entries);
      ptx::st_global_v4(&entries[slot_piece * layout.entries_per_slot + index],
                        make_int4(local_expert * static_cast<int>(layout.chunk) + place, selection,
                                  __float_as_int(weight), 0));
    }
    const uint32_t leaders = __ballot_sync(~0u, leads);
    SendPiece<kDType, kQuantize>(source.x + token * row_bytes, piece_bits, range_of(piece), hidden,
                                 row, leaders);
    __syncwarp();
    // Release: the piece and its entries, by all lanes.
    if (leads) ptx::st_release_sys_u64(flag, CountWord::Pack(call.epoch(), __popc(together)));
    return true;
  });
}

}  // namespace wideep
