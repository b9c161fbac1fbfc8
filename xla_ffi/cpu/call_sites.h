// Call sites of exchanges: which custom call of which executable a handler runs for.
#pragma once

#include <cstdint>
#include <memory>

#include "csrc/core/status.h"
#include "xla/ffi/api/ffi.h"

namespace wideep {

/// One call site of an executable. XLA instantiates it once and shares it among the devices, so its
/// number tells exchanges apart even where a traced function is called twice and its attributes are
/// equal.
struct OpInstance {
  static xla::ffi::TypeId id;
  static xla::ffi::TypeInfo info;
  int64_t number;  // in this process
  int64_t place;   // in its executable: the same in every process that runs the program
};

/// XLA instantiates an executable's call sites in the order of its program, on one thread, so
/// places are counted there, from 0 for each executable.
xla::ffi::ErrorOr<std::unique_ptr<OpInstance>> InstantiateOp();

/// To be called after each compilation, or load from a cache: what is instantiated next belongs to
/// another executable.
void ExecutableDone();

/// Two call sites of one launch (all that `run_id` says) cannot have the same place. They do where
/// another program was compiled on another thread while this one was; then its places are not those
/// that other processes count, and ranks might take one exchange for another.
Status CheckPlace(int64_t run_id, const OpInstance& instance);

}  // namespace wideep
