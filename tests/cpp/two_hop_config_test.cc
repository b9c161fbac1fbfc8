// How the exchange between nodes is set up, for drawn nodes and any ranks masked.
#include "csrc/ep/two_hop_config.h"

#include <algorithm>
#include <string>
#include <vector>

#include "csrc/ep/two_hop_roles.h"
#include "tests/cpp/check.h"
#include "tests/cpp/number_formats.h"

namespace wideep::two_hop {
namespace {

using testing::Random;
using testing::Uniform;

GroupShape DrawShape(Random& random) {
  GroupShape shape;
  int node = 0;
  const auto num_ranks = static_cast<int>(Uniform(random, 1, kMaxRanks));
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (rank > 0 && Uniform(random, 0, 2) == 0) ++node;
    shape.node_of_rank.push_back(node);
  }
  shape.arena = {num_ranks, num_ranks * 4, 8, 16 * Uniform(random, 1, 1000),
                 static_cast<int>(Uniform(random, 2, 32))};
  shape.tokens_under_way = static_cast<int>(Uniform(random, 1, 400));
  return shape;
}

TEST(AnyMaskFits) {
  Random random(1);
  for (int i = 0; i < 300; ++i) {
    const GroupShape shape = DrawShape(random);
    const int num_ranks = shape.arena.num_ranks;
    int64_t num_bytes = 0;
    CHECK(MemoryBytes(shape, num_bytes).ok());
    for (int j = 0; j < 20; ++j) {
      // The first without a mask.
      const auto masked = static_cast<uint32_t>(j * Uniform(random, 0, (1 << num_ranks) - 2));
      const uint32_t some = masked & ((1u << num_ranks) - 1);
      if (some == (1u << num_ranks) - 1) continue;
      const auto rank = static_cast<int>(Uniform(random, 0, num_ranks - 1));
      Context context;
      const Status status = MakeContext(shape, rank, some, nullptr, num_bytes, context);
      CHECK_EQ(status.message(), std::string());
      if (!status.ok()) return;
      const Config& config = context.layout.config();
      CHECK(context.layout.num_bytes() + static_cast<int64_t>(sizeof(RankState)) + kContextBytes <=
            num_bytes);
      CHECK(config.num_channels >= 1);
      CHECK(config.across_batch >= 1 && config.across_batch <= config.across_slots);

      // Numbers are the ranks that are left, in order; nodes are those of the ranks.
      const Nodes& nodes = config.nodes;
      int number = 0;
      for (int other = 0; other < num_ranks; ++other) {
        if (some >> other & 1) {
          CHECK_EQ(static_cast<int>(context.number_of[other]), -1);
          continue;
        }
        CHECK_EQ(static_cast<int>(context.number_of[other]), number);
        CHECK_EQ(static_cast<int>(context.rank_of[number]), other);
        const int before = number == 0 ? other : context.rank_of[number - 1];
        CHECK_EQ(number > 0 && nodes.NodeOf(number) != nodes.NodeOf(number - 1),
                 shape.node_of_rank[other] != shape.node_of_rank[before]);
        CHECK_EQ((context.node_ranks >> other & 1) != 0,
                 shape.node_of_rank[other] == shape.node_of_rank[rank]);
        ++number;
      }
      CHECK_EQ(nodes.num_ranks, number);

      // Every end of a ring has a warp, and one is left.
      for (int r = 0; r < number; ++r) {
        std::vector<int> sources;
        for (int other = 0; other < number; ++other) {
          if (nodes.NodeOf(other) != nodes.NodeOf(r) &&
              nodes.Forwarder(other, nodes.NodeOf(r)) == r) {
            sources.push_back(other);
          }
        }
        const int ends = nodes.num_nodes - 1 + static_cast<int>(sources.size());
        CHECK(ends * config.num_channels <= shape.arena.num_sms * kWarpsPerBlock);
        if (r != context.number) continue;
        CHECK_EQ(context.num_sources, static_cast<int>(sources.size()));
        for (size_t i = 0; i < sources.size(); ++i) {
          CHECK_EQ(static_cast<int>(context.sources[i]), sources[i]);
        }
      }
    }
  }
}

TEST(TooFewWarps) {
  GroupShape shape;
  for (int rank = 0; rank < kMaxRanks; ++rank) shape.node_of_rank.push_back(rank);
  shape.arena = {kMaxRanks, kMaxRanks, 8, 1024, 1};
  int64_t num_bytes = 0;
  const Status status = MemoryBytes(shape, num_bytes);
  CHECK(!status.ok());
  CHECK_CONTAINS(status.message(), "expected num_sms of at least 2");
  shape.arena.num_sms = 2;
  CHECK(MemoryBytes(shape, num_bytes).ok());
}

TEST(TooLittleMemory) {
  GroupShape shape;
  shape.node_of_rank = {0, 1};
  shape.arena = {2, 2, 8, 1024, 2};
  Config config;
  const Status status = MakeConfig(shape, 0, 1000, config);
  CHECK(!status.ok());
  CHECK_CONTAINS(status.message(), "bytes of registered memory, got 1000");
}

/// Every part of every role has one warp; the last role may take the warps that are left.
template <int kRoles>
void CheckRoles(int blocks, const Role (&given)[kRoles]) {
  const Roles<kRoles> roles(blocks, given);
  std::vector<std::vector<bool>> seen(kRoles);
  for (int block = 0; block < blocks; ++block) {
    int role_of_block = -1;
    for (int warp = 0; warp < kWarpsPerBlock; ++warp) {
      const Part part = roles.Of(block, warp);
      if (part.role == kRoles) continue;
      if (roles.apart()) {
        CHECK(role_of_block < 0 || role_of_block == part.role);
        role_of_block = part.role;
      }
      std::vector<bool>& parts = seen[part.role];
      if (parts.empty()) parts.resize(part.num_parts);
      CHECK_EQ(part.num_parts, static_cast<int>(parts.size()));
      CHECK(part.number >= 0 && part.number < part.num_parts);
      CHECK(!parts[part.number]);
      parts[part.number] = true;
    }
  }
  for (int r = 0; r < kRoles; ++r) {
    const auto parts = static_cast<int>(seen[r].size());
    CHECK(given[r].num_parts == Role::kAny ? parts > 0 : parts == given[r].num_parts);
    for (const bool has_warp : seen[r]) CHECK(has_warp);
  }
}

TEST(RolesOfWarps) {
  for (const int blocks : {1, 2, 3, 16, 33, 132}) {
    const int warps = blocks * kWarpsPerBlock;
    for (const int ends : {2, 3, 8, 15}) {
      if (warps < ends + 1) continue;
      const int channels = std::max(1, warps * 3 / 4 / ends);
      const int half = channels * (ends / 2);
      const int rest = channels * ends - half;
      CheckRoles<3>(blocks, {{half, 4 * half}, {rest, 5 * rest}, {Role::kAny, 5 * channels}});
      CheckRoles<3>(blocks, {{half, 1}, {rest, 1000}, {Role::kAny, 1}});
      CheckRoles<2>(blocks, {{half, 6}, {rest, 7}});
    }
    CheckRoles<3>(blocks, {{0, 0}, {0, 0}, {Role::kAny, 1}});  // a node alone
  }
  // Blocks go to the roles by their work, but no fewer than their parts need.
  const Roles<3> roles(16, {{80, 40}, {80, 50}, {Role::kAny, 60}});
  CHECK(roles.apart());
  CHECK_EQ(roles.blocks(0), 5);
  CHECK_EQ(roles.blocks(1), 5);
  CHECK_EQ(roles.blocks(2), 6);
  const Roles<3> alone(16, {{0, 0}, {0, 0}, {Role::kAny, 1}});
  CHECK_EQ(alone.blocks(2), 16);
  const Roles<2> first(16, {{16, 1}, {0, 0}});
  CHECK_EQ(first.blocks(0), 16);
  const Roles<2> few(2, {{17, 1}, {1, 1}});
  CHECK(!few.apart());
}

}  // namespace
}  // namespace wideep::two_hop
