#include "csrc/ep/two_hop_launch.cuh"
#include "csrc/ep/two_hop_mapped.h"

namespace wideep {

Status MakeMappedTwoHop(const TwoHopSettings& settings, const MappedNet& net,
                        std::shared_ptr<TwoHop>& out) {
  return MakeTwoHop(settings, net, out);
}

}  // namespace wideep
