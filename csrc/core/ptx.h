// Every PTX instruction that the kernels use: one function per instruction, with scope and order in
// its name.
//
// Addresses called `smem` are 32-bit shared-memory addresses of this block (SharedAddress); those
// called `cluster_smem` are of any block of the cluster (mapa_shared_cluster).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace wideep::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ==== exchange between ranks: flags, time, bulk copies of rows ====

// ---- flags: relaxed to look, acquire before what the flag vouches for, release after it ----

__device__ inline uint32_t ld_relaxed_sys_u32(const uint32_t* pointer) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
  return v;
}

__device__ inline uint32_t ld_acquire_sys_u32(const uint32_t* pointer) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
  return v;
}

__device__ inline uint32_t ld_acquire_gpu_u32(const uint32_t* pointer) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
  return v;
}

__device__ inline uint32_t ld_relaxed_gpu_u32(const uint32_t* pointer) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
  return v;
}

__device__ inline uint64_t ld_relaxed_sys_u64(const uint64_t* pointer) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(pointer) : "memory");
  return v;
}

__device__ inline void st_relaxed_sys_u64(uint64_t* pointer, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(pointer), "l"(v) : "memory");
}

__device__ inline void st_relaxed_sys_u32(uint32_t* pointer, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(pointer), "r"(v) : "memory");
}

__device__ inline void st_release_gpu_u32(uint32_t* pointer, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(pointer), "r"(v) : "memory");
}

__device__ inline uint64_t ld_acquire_sys_u64(const uint64_t* pointer) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(pointer) : "memory");
  return v;
}

__device__ inline void st_release_sys_u32(uint32_t* pointer, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(pointer), "r"(v) : "memory");
}

__device__ inline void st_release_sys_u64(uint64_t* pointer, uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(pointer), "l"(v) : "memory");
}

/// Returns the value before.
__device__ inline uint32_t atom_add_acq_rel_gpu_u32(uint32_t* pointer, uint32_t v) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(pointer), "r"(v)
               : "memory");
  return before;
}

/// Stores `v` where `expected` is found; returns the value before.
__device__ inline uint32_t atom_cas_acq_rel_gpu_u32(uint32_t* pointer, uint32_t expected,
                                                    uint32_t v) {
  uint32_t before;
  asm volatile("atom.cas.acq_rel.gpu.global.b32 %0, [%1], %2, %3;"
               : "=r"(before)
               : "l"(pointer), "r"(expected), "r"(v)
               : "memory");
  return before;
}

__device__ inline void red_add_relaxed_sys_u64(uint64_t* pointer, uint64_t v) {
  asm volatile("red.relaxed.sys.global.add.u64 [%0], %1;" ::"l"(pointer), "l"(v) : "memory");
}

// ---- fences and time ----

__device__ inline void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

/// Between ordinary accesses and those of bulk copies, in any memory.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

/// Nanoseconds; the same clock on all multiprocessors, coarse.
__device__ inline uint64_t globaltimer() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns)::"memory");
  return ns;
}

// ---- rows ----

/// 16 bytes that are read once.
__device__ inline int4 ld_global_no_allocate_v4(const void* pointer) {
  int4 v;
  asm volatile("ld.global.L1::no_allocate.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer)
               : "memory");
  return v;
}

/// As above, with a policy for the lines of L2 that it reads.
__device__ inline int4 ld_global_no_allocate_cache_hint_v4(const void* pointer, uint64_t policy) {
  int4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.s32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer), "l"(policy)
               : "memory");
  return v;
}

__device__ inline void st_global_v4(void* pointer, int4 v) {
  asm volatile("st.global.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

/// Global to shared memory, counted in bytes on an mbarrier; addresses and size in units of 16
/// bytes.
__device__ inline void cp_async_bulk_load(uint32_t smem, const void* pointer, uint32_t bytes,
                                          uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem),
      "l"(pointer), "r"(bytes), "r"(mbarrier)
      : "memory");
}

/// As above, with a policy for the lines of L2 that it reads.
__device__ inline void cp_async_bulk_load_cache_hint(uint32_t smem, const void* pointer,
                                                     uint32_t bytes, uint32_t mbarrier,
                                                     uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(smem),
      "l"(pointer), "r"(bytes), "r"(mbarrier), "l"(policy)
      : "memory");
}

/// Shared to global memory, part of this thread's next group; addresses and size as above.
__device__ inline void cp_async_bulk_store(void* pointer, uint32_t smem, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(pointer),
               "r"(smem), "r"(bytes)
               : "memory");
}

/// What L2 drops first: rows that nobody reads soon.
__device__ inline uint64_t createpolicy_l2_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

/// What L2 drops last: slots that are read soon and written again.
__device__ inline uint64_t createpolicy_l2_evict_last() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

/// As cp_async_bulk_store, with a policy for the lines of L2 that it writes.
__device__ inline void cp_async_bulk_store_cache_hint(void* pointer, uint32_t smem, uint32_t bytes,
                                                      uint64_t policy) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(
          pointer),
      "r"(smem), "r"(bytes), "l"(policy)
      : "memory");
}

/// Waits until at most `kPending` of this thread's groups have yet to finish their writes.
template <int kPending>
__device__ inline void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ==== grouped GEMM: clusters, barriers in shared memory, tensor copies, matrix products (sm_90a)
// ====

// ---- clusters and roles ----

__device__ inline uint32_t cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// The address, in block `rank` of the cluster, of what lies at `smem` in this block.
__device__ inline uint32_t mapa_shared_cluster(uint32_t smem, uint32_t rank) {
  uint32_t cluster_smem;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(cluster_smem) : "r"(smem), "r"(rank));
  return cluster_smem;
}

__device__ inline void barrier_cluster_arrive_release() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ inline void barrier_cluster_wait_acquire() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Barrier number `id` (1 to 15) among `num_threads` threads of the block.
__device__ inline void bar_sync(uint32_t id, uint32_t num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

template <int kRegisters>
__device__ inline void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- fences ----

/// Makes initialised mbarriers visible to the cluster and to the copy engine.
__device__ inline void fence_mbarrier_init_release_cluster() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Between ordinary accesses of shared memory and those of the copy engine or the tensor cores.
__device__ inline void fence_proxy_async_shared_cta() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- mbarrier ----

__device__ inline void mbarrier_init_shared(uint32_t smem, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem), "r"(num_arrivals) : "memory");
}

__device__ inline void mbarrier_arrive_release_cta(uint32_t smem) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(smem) : "memory");
}

/// Arrives, and makes the current phase wait for `bytes` more.
__device__ inline void mbarrier_arrive_expect_tx_release_cta(uint32_t smem, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(smem),
               "r"(bytes)
               : "memory");
}

__device__ inline void mbarrier_arrive_expect_tx_release_cluster(uint32_t cluster_smem,
                                                                 uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(
                   cluster_smem),
               "r"(bytes)
               : "memory");
}

/// Publishes nothing: says only that this thread is done with what it read. A release at this scope
/// would wait for every store under way, which costs a third of the speed of a matrix product.
__device__ inline void mbarrier_arrive_relaxed_cluster(uint32_t cluster_smem) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_smem)
               : "memory");
}

/// Whether the phase of this parity has completed; may sleep a little before it says no.
__device__ inline bool mbarrier_try_wait_parity_acquire_cta(uint32_t smem, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(smem), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ inline bool mbarrier_try_wait_parity_acquire_cluster(uint32_t smem, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(smem), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ inline bool mbarrier_try_wait_parity_relaxed_cluster(uint32_t smem, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(smem), "r"(parity)
      : "memory");
  return done != 0;
}

/// Stores 16 bytes in a block of the cluster and counts them on an mbarrier of the same block.
__device__ inline void st_async_cluster_v4(uint32_t cluster_smem, int4 v,
                                           uint32_t cluster_mbarrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(cluster_smem),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(cluster_mbarrier)
      : "memory");
}

// ---- tensor copies: a box of a tensor map to shared memory, counted in bytes on an mbarrier ----

__device__ inline void prefetch_tensormap(const void* tensor_map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(tensor_map) : "memory");
}

__device__ inline void cp_async_bulk_tensor_2d_load(uint32_t smem, const void* tensor_map, int x,
                                                    int y, uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], "
      "[%4];" ::"r"(smem),
      "l"(tensor_map), "r"(x), "r"(y), "r"(mbarrier)
      : "memory");
}

/// The same bytes at the same place in every block of `block_mask`, counted on each one's own
/// mbarrier.
__device__ inline void cp_async_bulk_tensor_2d_load_multicast(uint32_t smem, const void* tensor_map,
                                                              int x, int y, uint32_t mbarrier,
                                                              uint16_t block_mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
      "cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(tensor_map), "r"(x), "r"(y), "r"(mbarrier), "h"(block_mask)
      : "memory");
}

__device__ inline void cp_async_bulk_tensor_3d_load(uint32_t smem, const void* tensor_map, int x,
                                                    int y, int z, uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3, %4}], "
      "[%5];" ::"r"(smem),
      "l"(tensor_map), "r"(x), "r"(y), "r"(z), "r"(mbarrier)
      : "memory");
}

/// Shared memory to a box of a tensor map; what lies outside of the array is not written.
__device__ inline void cp_async_bulk_tensor_3d_store(const void* tensor_map, int x, int y, int z,
                                                     uint32_t smem) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(
          tensor_map),
      "r"(x), "r"(y), "r"(z), "r"(smem)
      : "memory");
}

/// Makes a group of this thread's stores since the last group.
__device__ inline void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Waits until at most `kPending` of this thread's groups have yet to read their shared memory.
template <int kPending>
__device__ inline void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// ---- matrix fragments ----

/// Stores four 8x8 matrices of 16-bit elements, each transposed; lane i gives the address of row i
/// % 8 of matrix i / 8 as it lies in shared memory.
__device__ inline void stmatrix_x4_trans(uint32_t smem, uint32_t m0, uint32_t m1, uint32_t m2,
                                         uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// ---- wgmma ----

/// Before the first product of a tile, and whenever other code has touched the accumulators.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most `kPending` committed groups are unfinished.
template <int kPending>
__device__ inline void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// d[64, kN] += a[64, 16] * b[16, kN] for one warpgroup; f32 accumulators, 16-bit operands in
/// shared memory. kTransA, kTransB: 1 if that operand is contiguous along its 64 or kN rather than
/// along the 16.
template <typename T, int kN, int kTransA, int kTransB>
struct WgmmaM64K16;

// The accumulators as operand constraints, and as operand names, eight at a time.
#define WIDEEP_ACC8(d, i)                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define WIDEEP_ACC_16(d) WIDEEP_ACC8(d, 0)
#define WIDEEP_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WIDEEP_ACC_32(d) WIDEEP_ACC_16(d), WIDEEP_ACC8(d, 8)
#define WIDEEP_NAMES_32 WIDEEP_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WIDEEP_ACC_48(d) WIDEEP_ACC_32(d), WIDEEP_ACC8(d, 16)
#define WIDEEP_NAMES_48 WIDEEP_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WIDEEP_ACC_64(d) WIDEEP_ACC_48(d), WIDEEP_ACC8(d, 24)
#define WIDEEP_NAMES_64 WIDEEP_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WIDEEP_ACC_80(d) WIDEEP_ACC_64(d), WIDEEP_ACC8(d, 32)
#define WIDEEP_NAMES_80 WIDEEP_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WIDEEP_ACC_96(d) WIDEEP_ACC_80(d), WIDEEP_ACC8(d, 40)
#define WIDEEP_NAMES_96 WIDEEP_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WIDEEP_ACC_112(d) WIDEEP_ACC_96(d), WIDEEP_ACC8(d, 48)
#define WIDEEP_NAMES_112 WIDEEP_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WIDEEP_ACC_128(d) WIDEEP_ACC_112(d), WIDEEP_ACC8(d, 56)
#define WIDEEP_NAMES_128 WIDEEP_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WIDEEP_ACC_144(d) WIDEEP_ACC_128(d), WIDEEP_ACC8(d, 64)
#define WIDEEP_NAMES_144 WIDEEP_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WIDEEP_ACC_160(d) WIDEEP_ACC_144(d), WIDEEP_ACC8(d, 72)
#define WIDEEP_NAMES_160 WIDEEP_NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WIDEEP_ACC_176(d) WIDEEP_ACC_160(d), WIDEEP_ACC8(d, 80)
#define WIDEEP_NAMES_176 WIDEEP_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WIDEEP_ACC_192(d) WIDEEP_ACC_176(d), WIDEEP_ACC8(d, 88)
#define WIDEEP_NAMES_192 WIDEEP_NAMES_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WIDEEP_ACC_208(d) WIDEEP_ACC_192(d), WIDEEP_ACC8(d, 96)
#define WIDEEP_NAMES_208 WIDEEP_NAMES_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WIDEEP_ACC_224(d) WIDEEP_ACC_208(d), WIDEEP_ACC8(d, 104)
#define WIDEEP_NAMES_224 WIDEEP_NAMES_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WIDEEP_ACC_240(d) WIDEEP_ACC_224(d), WIDEEP_ACC8(d, 112)
#define WIDEEP_NAMES_240 WIDEEP_NAMES_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WIDEEP_ACC_256(d) WIDEEP_ACC_240(d), WIDEEP_ACC8(d, 120)
#define WIDEEP_NAMES_256 WIDEEP_NAMES_240 ", %120, %121, %122, %123, %124, %125, %126, %127"

// TYPES: ".f32.bf16.bf16" or ".f32.f16.f16"; A, B, TA, TB: names of the operands after the
// accumulators.
#define WIDEEP_WGMMA(TYPE, TYPES, N, A, B, TA, TB)                                          \
  template <int kTransA, int kTransB>                                                       \
  struct WgmmaM64K16<TYPE, N, kTransA, kTransB> {                                           \
    static __device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a_descriptor,  \
                                                 uint64_t b_descriptor) {                   \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16" TYPES " {" WIDEEP_NAMES_##N \
                   "}, " A ", " B ", 1, 1, 1, " TA ", " TB ";"                              \
                   : WIDEEP_ACC_##N(d)                                                      \
                   : "l"(a_descriptor), "l"(b_descriptor), "n"(kTransA), "n"(kTransB));     \
    }                                                                                       \
  };
#define WIDEEP_WGMMA_TYPES(N, A, B, TA, TB)                      \
  WIDEEP_WGMMA(__nv_bfloat16, ".f32.bf16.bf16", N, A, B, TA, TB) \
  WIDEEP_WGMMA(__half, ".f32.f16.f16", N, A, B, TA, TB)
WIDEEP_WGMMA_TYPES(16, "%8", "%9", "%10", "%11")
WIDEEP_WGMMA_TYPES(32, "%16", "%17", "%18", "%19")
WIDEEP_WGMMA_TYPES(48, "%24", "%25", "%26", "%27")
WIDEEP_WGMMA_TYPES(64, "%32", "%33", "%34", "%35")
WIDEEP_WGMMA_TYPES(80, "%40", "%41", "%42", "%43")
WIDEEP_WGMMA_TYPES(96, "%48", "%49", "%50", "%51")
WIDEEP_WGMMA_TYPES(112, "%56", "%57", "%58", "%59")
WIDEEP_WGMMA_TYPES(128, "%64", "%65", "%66", "%67")
WIDEEP_WGMMA_TYPES(144, "%72", "%73", "%74", "%75")
WIDEEP_WGMMA_TYPES(160, "%80", "%81", "%82", "%83")
WIDEEP_WGMMA_TYPES(176, "%88", "%89", "%90", "%91")
WIDEEP_WGMMA_TYPES(192, "%96", "%97", "%98", "%99")
WIDEEP_WGMMA_TYPES(208, "%104", "%105", "%106", "%107")
WIDEEP_WGMMA_TYPES(224, "%112", "%113", "%114", "%115")
WIDEEP_WGMMA_TYPES(240, "%120", "%121", "%122", "%123")
WIDEEP_WGMMA_TYPES(256, "%128", "%129", "%130", "%131")

#undef WIDEEP_WGMMA_TYPES
#undef WIDEEP_WGMMA
#undef WIDEEP_ACC8
#undef WIDEEP_ACC_16
#undef WIDEEP_NAMES_16
#undef WIDEEP_ACC_32
#undef WIDEEP_NAMES_32
#undef WIDEEP_ACC_48
#undef WIDEEP_NAMES_48
#undef WIDEEP_ACC_64
#undef WIDEEP_NAMES_64
#undef WIDEEP_ACC_80
#undef WIDEEP_NAMES_80
#undef WIDEEP_ACC_96
#undef WIDEEP_NAMES_96
#undef WIDEEP_ACC_112
#undef WIDEEP_NAMES_112
#undef WIDEEP_ACC_128
#undef WIDEEP_NAMES_128
#undef WIDEEP_ACC_144
#undef WIDEEP_NAMES_144
#undef WIDEEP_ACC_160
#undef WIDEEP_NAMES_160
#undef WIDEEP_ACC_176
#undef WIDEEP_NAMES_176
#undef WIDEEP_ACC_192
#undef WIDEEP_NAMES_192
#undef WIDEEP_ACC_208
#undef WIDEEP_NAMES_208
#undef WIDEEP_ACC_224
#undef WIDEEP_NAMES_224
#undef WIDEEP_ACC_240
#undef WIDEEP_NAMES_240
#undef WIDEEP_ACC_256
#undef WIDEEP_NAMES_256

}  // namespace wideep::ptx
