// The part of _wideep_cuda that makes groups: what Python calls while a group is set up.
#pragma once

#include <nanobind/nanobind.h>

namespace wideep {

void AddPeerGroups(nanobind::module_& m);

}  // namespace wideep
