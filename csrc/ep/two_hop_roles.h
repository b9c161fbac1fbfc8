// Who does what in a kernel over nodes: which of a rank's warps run which stages (roles) of an op.
//
// Roles have blocks of their own where there are enough. Then only one role's code has to fit an
// SM's instruction cache, which it does, and that of two does not. Blocks are given out by work, so
// that the roles end together.
#pragma once

#include "csrc/core/host_device.h"
#include "csrc/core/layout.h"

namespace wideep::two_hop {

struct Role {
  /// As many as there are warps; of the last role only, or of the only one with parts.
  static constexpr int kAny = -1;
  int num_parts;  // a warp each
  int work;       // of all parts together, for comparison with other roles
};

/// A warp's part in an op.
struct Part {
  int role;    // kRoles: none
  int number;  // of the role's parts
  int num_parts;
};

template <int kRoles>
class Roles {
 public:
  /// There are warps enough for all parts, and one more for the last role if it takes any number.
  WIDEEP_HOST_DEVICE Roles(int num_blocks, const Role (&roles)[kRoles]) : num_blocks_(num_blocks) {
    int free_blocks = num_blocks;
    for (int r = 0; r < kRoles; ++r) {
      roles_[r] = roles[r];
      blocks_[r] = MinBlocks(roles[r]);
      free_blocks -= blocks_[r];
    }
    apart_ = free_blocks >= 0;
    for (; free_blocks > 0; --free_blocks) {
      int busiest = 0;
      for (int r = 1; r < kRoles; ++r) {
        // By what a block would have to do, were this one given.
        if (roles[r].work * (blocks_[busiest] + 1) > roles[busiest].work * (blocks_[r] + 1)) {
          busiest = r;
        }
      }
      ++blocks_[busiest];
    }
  }

  /// Whether blocks have one role each.
  WIDEEP_HOST_DEVICE bool apart() const { return apart_; }
  /// Of a role, if they are apart. Those of role 0 come first.
  WIDEEP_HOST_DEVICE int blocks(int role) const { return blocks_[role]; }

  /// Parts with neighbouring numbers lie in different blocks.
  WIDEEP_HOST_DEVICE Part Of(int block, int warp) const {
    int number = warp * num_blocks_ + block;
    int num_parts = num_blocks_ * kWarpsPerBlock;
    for (int r = 0; r < kRoles; ++r) {
      if (apart_) {
        if (block >= blocks_[r]) {
          block -= blocks_[r];
          continue;
        }
        number = warp * blocks_[r] + block;
        num_parts = blocks_[r] * kWarpsPerBlock;
      }
      if (roles_[r].num_parts == Role::kAny) return {r, number, num_parts};
      if (number < roles_[r].num_parts) return {r, number, roles_[r].num_parts};
      if (apart_) break;
      number -= roles_[r].num_parts;
      num_parts -= roles_[r].num_parts;
    }
    return {kRoles, 0, 0};
  }

 private:
  static WIDEEP_HOST_DEVICE int MinBlocks(const Role& role) {
    return role.num_parts == Role::kAny ? 1
                                        : (role.num_parts + kWarpsPerBlock - 1) / kWarpsPerBlock;
  }

  const int num_blocks_;
  bool apart_;
  Role roles_[kRoles];
  int blocks_[kRoles];
};

}  // namespace wideep::two_hop
