// The throughput shape over virtual nodes of one host.
#pragma once

#include <memory>

#include "csrc/core/status.h"
#include "csrc/ep/mapped_net.cuh"
#include "csrc/ep/two_hop_settings.h"

namespace wideep {

/// Between nodes by stores. Ready for the first op once every rank has made its own.
Status MakeMappedTwoHop(const TwoHopSettings& settings, const MappedNet& net,
                        std::shared_ptr<TwoHop>& out);

}  // namespace wideep
