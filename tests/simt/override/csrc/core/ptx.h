// csrc/core/ptx.h for the emulator: the instructions of the exchange between ranks, by the same
// names. Those of the grouped GEMM are not there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tests/simt/kernel_api.h"

namespace wideep::ptx {

using simt::Order;
using simt::Rmw;
using simt::Scope;
using simt::Site;

inline uint32_t SharedAddress(const void* pointer, Site site = Site::Here()) {
  return simt::SharedOffset(pointer, site);
}

// ---- flags ----

#define SIMT_LOAD(name, type, order, scope)                                       \
  inline type name(const type* pointer, Site site = Site::Here()) {               \
    return static_cast<type>(                                                     \
        simt::FlagLoad(pointer, sizeof(type), Order::order, Scope::scope, site)); \
  }
SIMT_LOAD(ld_relaxed_sys_u32, uint32_t, kRelaxed, kSys)
SIMT_LOAD(ld_relaxed_sys_u64, uint64_t, kRelaxed, kSys)
SIMT_LOAD(ld_relaxed_gpu_u32, uint32_t, kRelaxed, kGpu)
SIMT_LOAD(ld_relaxed_gpu_u64, uint64_t, kRelaxed, kGpu)
SIMT_LOAD(ld_acquire_sys_u32, uint32_t, kAcquire, kSys)
SIMT_LOAD(ld_acquire_sys_u64, uint64_t, kAcquire, kSys)
SIMT_LOAD(ld_acquire_gpu_u32, uint32_t, kAcquire, kGpu)
SIMT_LOAD(ld_acquire_gpu_u64, uint64_t, kAcquire, kGpu)
#undef SIMT_LOAD

#define SIMT_STORE(name, type, order, scope)                                     \
  inline void name(type* pointer, type v, Site site = Site::Here()) {            \
    simt::FlagStore(pointer, sizeof(type), v, Order::order, Scope::scope, site); \
  }
SIMT_STORE(st_relaxed_sys_u32, uint32_t, kRelaxed, kSys)
SIMT_STORE(st_relaxed_sys_u64, uint64_t, kRelaxed, kSys)
SIMT_STORE(st_relaxed_gpu_u32, uint32_t, kRelaxed, kGpu)
SIMT_STORE(st_release_sys_u32, uint32_t, kRelease, kSys)
SIMT_STORE(st_release_sys_u64, uint64_t, kRelease, kSys)
SIMT_STORE(st_release_gpu_u32, uint32_t, kRelease, kGpu)
SIMT_STORE(st_release_gpu_u64, uint64_t, kRelease, kGpu)
#undef SIMT_STORE

#define SIMT_ADD(name, order, scope)                                                      \
  inline uint32_t name(uint32_t* pointer, uint32_t v, Site site = Site::Here()) {         \
    return static_cast<uint32_t>(                                                         \
        simt::FlagUpdate(Rmw::kAdd, pointer, 4, v, 0, Order::order, Scope::scope, site)); \
  }
SIMT_ADD(atom_add_relaxed_gpu_u32, kRelaxed, kGpu)
SIMT_ADD(atom_add_relaxed_sys_u32, kRelaxed, kSys)
SIMT_ADD(atom_add_release_gpu_u32, kRelease, kGpu)
SIMT_ADD(atom_add_release_sys_u32, kRelease, kSys)
SIMT_ADD(atom_add_acq_rel_gpu_u32, kAcqRel, kGpu)
SIMT_ADD(atom_add_acq_rel_sys_u32, kAcqRel, kSys)
#undef SIMT_ADD

inline void red_add_relaxed_sys_u64(uint64_t* pointer, uint64_t v, Site site = Site::Here()) {
  simt::FlagUpdate(Rmw::kAdd, pointer, 8, v, 0, Order::kRelaxed, Scope::kSys, site);
}

inline uint32_t atom_cas_acq_rel_gpu_u32(uint32_t* pointer, uint32_t expected, uint32_t v,
                                         Site site = Site::Here()) {
  return static_cast<uint32_t>(
      simt::FlagUpdate(Rmw::kCas, pointer, 4, v, expected, Order::kAcqRel, Scope::kGpu, site));
}

// ---- fences and time ----

inline void fence_acq_rel_sys(Site site = Site::Here()) { simt::Fence(Scope::kSys, site); }
inline void fence_acq_rel_gpu(Site site = Site::Here()) { simt::Fence(Scope::kGpu, site); }
inline void fence_proxy_async(Site site = Site::Here()) { simt::ProxyFence(site); }
inline void fence_proxy_async_shared_cta(Site site = Site::Here()) { simt::ProxyFence(site); }
/// Initialised mbarriers become visible to other threads by a barrier, as the emulator demands
/// anyway.
inline void fence_mbarrier_init_release_cluster() {}
inline uint64_t globaltimer(Site site = Site::Here()) { return simt::Time(site); }

// ---- barriers ----

inline void bar_sync(uint32_t id, uint32_t num_threads, Site site = Site::Here()) {
  simt::BarSync(id, num_threads, "bar_sync", site);
}
inline void mbarrier_init_shared(uint32_t smem, uint32_t num_arrivals, Site site = Site::Here()) {
  simt::MbarrierInit(smem, num_arrivals, site);
}
inline void mbarrier_arrive_release_cta(uint32_t smem, Site site = Site::Here()) {
  simt::MbarrierArrive(smem, 0, site);
}
inline void mbarrier_arrive_expect_tx_release_cta(uint32_t smem, uint32_t bytes,
                                                  Site site = Site::Here()) {
  simt::MbarrierArrive(smem, bytes, site);
}
inline bool mbarrier_try_wait_parity_acquire_cta(uint32_t smem, uint32_t parity,
                                                 Site site = Site::Here()) {
  return simt::MbarrierTryWait(smem, parity, site);
}

// ---- rows ----

inline int4 ld_global_no_allocate_v4(const void* pointer, Site site = Site::Here()) {
  int4 v;
  simt::Load16(&v, pointer, site);
  return v;
}
inline int4 ld_global_no_allocate_cache_hint_v4(const void* pointer, uint64_t,
                                                Site site = Site::Here()) {
  return ld_global_no_allocate_v4(pointer, site);
}
inline void st_global_v4(void* pointer, int4 v, Site site = Site::Here()) {
  simt::Store16(pointer, &v, site);
}

inline void cp_async_bulk_load(uint32_t smem, const void* pointer, uint32_t bytes,
                               uint32_t mbarrier, Site site = Site::Here()) {
  simt::BulkLoad(smem, pointer, bytes, mbarrier, site);
}
inline void cp_async_bulk_load_cache_hint(uint32_t smem, const void* pointer, uint32_t bytes,
                                          uint32_t mbarrier, uint64_t, Site site = Site::Here()) {
  simt::BulkLoad(smem, pointer, bytes, mbarrier, site);
}
inline void cp_async_bulk_store(void* pointer, uint32_t smem, uint32_t bytes,
                                Site site = Site::Here()) {
  simt::BulkStore(pointer, smem, bytes, site);
}
inline uint64_t createpolicy_l2_evict_first() { return 0; }
inline uint64_t createpolicy_l2_evict_last() { return 0; }
inline void cp_async_bulk_store_cache_hint(void* pointer, uint32_t smem, uint32_t bytes, uint64_t,
                                           Site site = Site::Here()) {
  simt::BulkStore(pointer, smem, bytes, site);
}
inline void cp_async_bulk_commit_group() { simt::BulkCommit(); }
template <int kPending>
void cp_async_bulk_wait_group(Site site = Site::Here()) {
  simt::BulkWait(kPending, /*read_only=*/false, site);
}
template <int kPending>
void cp_async_bulk_wait_group_read(Site site = Site::Here()) {
  simt::BulkWait(kPending, /*read_only=*/true, site);
}

}  // namespace wideep::ptx
