"""The one list of C++ and CUDA sources. Read by CMakeLists.txt and by BUILD.

CMake parses this file as text: keep one `NAME = [` per list and one quoted path per line.
"""

# csrc without CUDA: no XLA, no Python.
HOST_SOURCES = [
    "csrc/core/elastic_threads.cc",
    "csrc/core/worker_pool.cc",
    "csrc/ep/combine_host.cc",
    "csrc/ep/dispatch_host.cc",
    "csrc/ep/low_latency_host.cc",
    "csrc/ep/plan_host.cc",
    "csrc/ep/row_kernels_select.cc",
    "csrc/ep/two_hop_config.cc",
    "csrc/transport/host_arena.cc",
    "csrc/transport/host_peers.cc",
    "csrc/transport/host_rendezvous.cc",
    "csrc/transport/host_staging.cc",
]

HOST_HEADERS = [
    "csrc/core/dtype.h",
    "csrc/core/elastic_threads.h",
    "csrc/core/float_env.h",
    "csrc/core/host_device.h",
    "csrc/core/layout.h",
    "csrc/core/pages.h",
    "csrc/core/status.h",
    "csrc/core/worker_pool.h",
    "csrc/ep/combine_host.h",
    "csrc/ep/dispatch_host.h",
    "csrc/ep/low_latency_host.h",
    "csrc/ep/plan_host.h",
    "csrc/ep/row_kernels.h",
    "csrc/ep/sent_host.h",
    "csrc/ep/token_tasks.h",
    "csrc/ep/two_hop_config.h",
    "csrc/ep/two_hop_layout.h",
    "csrc/ep/two_hop_protocol.h",
    "csrc/ep/two_hop_roles.h",
    "csrc/transport/host_arena.h",
    "csrc/transport/host_peers.h",
    "csrc/transport/host_rendezvous.h",
    "csrc/transport/host_staging.h",
]

# Compiled once per instruction set; row_kernels_select.cc picks at run time.
ROW_KERNEL_SOURCE = [
    "csrc/ep/row_kernels.cc",
]

# FFI handlers and the nanobind module of the CPU backend.
CPU_FFI_SOURCES = [
    "xla_ffi/cpu/call_sites.cc",
    "xla_ffi/cpu/combine.cc",
    "xla_ffi/cpu/dispatch.cc",
    "xla_ffi/cpu/group_registry.cc",
    "xla_ffi/cpu/low_latency.cc",
    "xla_ffi/cpu/module.cc",
    "xla_ffi/cpu/plan.cc",
]

CPU_FFI_HEADERS = [
    "xla_ffi/cpu/call_sites.h",
    "xla_ffi/cpu/group_registry.h",
    "xla_ffi/cpu/handlers.h",
    "xla_ffi/cpu/meet.h",
    "xla_ffi/ffi_util.h",
]

CPP_TESTS = [
    "tests/cpp/elastic_threads_test.cc",
    "tests/cpp/exchange_test.cc",
    "tests/cpp/host_peers_test.cc",
    "tests/cpp/low_latency_test.cc",
    "tests/cpp/masked_test.cc",
    "tests/cpp/plan_test.cc",
    "tests/cpp/rendezvous_test.cc",
    "tests/cpp/row_kernels_test.cc",
    "tests/cpp/two_hop_config_test.cc",
    "tests/cpp/two_hop_test.cc",
    "tests/cpp/worker_pool_test.cc",
    "tests/model/two_hop_explore.cc",
]

CPP_TEST_HEADERS = [
    "tests/cpp/check.h",
    "tests/cpp/exchange_testing.h",
    "tests/cpp/number_formats.h",
    "tests/cpp/two_hop_plan.h",
    "tests/cpp/two_hop_stages.h",
    "tests/cpp/two_hop_world.h",
    "tests/model/two_hop_model.h",
]

# The grouped GEMM: csrc, so no XLA and no Python.
GEMM_CUDA_SOURCES = [
    "csrc/gemm/forward.cu",
    "csrc/gemm/grouped_matmul.cc",
    "csrc/gemm/input_grad.cu",
    "csrc/gemm/schedule.cu",
    "csrc/gemm/swiglu.cu",
    "csrc/gemm/tensor_map.cc",
    "csrc/gemm/weight_grad.cu",
]

GEMM_CUDA_HEADERS = [
    "csrc/core/ptx.h",
    "csrc/gemm/grouped_matmul.h",
    "csrc/gemm/product.h",
    "csrc/gemm/product_config.cuh",
    "csrc/gemm/product_kernel.cuh",
    "csrc/gemm/product_load.cuh",
    "csrc/gemm/product_output.cuh",
    "csrc/gemm/schedule.h",
    "csrc/gemm/swiglu.h",
    "csrc/gemm/tensor_map.h",
    "csrc/gemm/tile_finder.cuh",
]

# The exchange on CUDA and its transport: csrc, so no XLA and no Python.
EXCHANGE_CUDA_SOURCES = [
    "csrc/core/error_record.cc",
    "csrc/ep/combine.cu",
    "csrc/ep/dispatch.cu",
    "csrc/ep/low_latency.cu",
    "csrc/ep/low_latency_relayed.cc",
    "csrc/ep/plan.cu",
    "csrc/ep/quantize.cu",
    "csrc/transport/device_memory.cc",
    "csrc/transport/peer.cc",
]

EXCHANGE_CUDA_HEADERS = [
    "csrc/core/convert.cuh",
    "csrc/core/error_record.h",
    "csrc/core/host_device.h",
    "csrc/core/launch.cuh",
    "csrc/core/layout.h",
    "csrc/ep/arrivals.cuh",
    "csrc/ep/bulk_pipe.cuh",
    "csrc/ep/combine.cuh",
    "csrc/ep/combine.h",
    "csrc/ep/combine_order.cuh",
    "csrc/ep/combine_pull.cuh",
    "csrc/ep/combine_reduce.cuh",
    "csrc/ep/dispatch.cuh",
    "csrc/ep/dispatch.h",
    "csrc/ep/dispatch_shared.cuh",
    "csrc/ep/exchange_protocol.cuh",
    "csrc/ep/load_kernels.h",
    "csrc/ep/low_latency.cuh",
    "csrc/ep/low_latency.h",
    "csrc/ep/low_latency_combine.cuh",
    "csrc/ep/low_latency_combine_grad.cuh",
    "csrc/ep/low_latency_protocol.cuh",
    "csrc/ep/low_latency_receive.cuh",
    "csrc/ep/low_latency_relayed.h",
    "csrc/ep/low_latency_send.cuh",
    "csrc/ep/mapped_net.cuh",
    "csrc/ep/node_arrivals.cuh",
    "csrc/ep/peer_context.h",
    "csrc/ep/plan.cuh",
    "csrc/ep/plan.h",
    "csrc/ep/plan_block.cuh",
    "csrc/ep/quantize.cuh",
    "csrc/ep/quantize.h",
    "csrc/ep/ring.cuh",
    "csrc/ep/row_sum.cuh",
    "csrc/ep/two_hop.h",
    "csrc/ep/two_hop_combine.cuh",
    "csrc/ep/two_hop_combine_grad.cuh",
    "csrc/ep/two_hop_dispatch.cuh",
    "csrc/ep/two_hop_launch.cuh",
    "csrc/ep/two_hop_mapped.h",
    "csrc/ep/two_hop_plan.cuh",
    "csrc/ep/two_hop_rank.cuh",
    "csrc/ep/two_hop_settings.h",
    "csrc/ep/zero_tail.cuh",
    "csrc/transport/device_memory.h",
    "csrc/transport/peer.h",
    "csrc/transport/relay.cuh",
    "csrc/transport/relay.h",
]

# FFI handlers and the nanobind module of the CUDA backend; host compiler only.
CUDA_FFI_SOURCES = [
    "xla_ffi/cuda/combine.cc",
    "xla_ffi/cuda/dispatch.cc",
    "xla_ffi/cuda/grouped_matmul.cc",
    "xla_ffi/cuda/low_latency.cc",
    "xla_ffi/cuda/module.cc",
    "xla_ffi/cuda/peer_groups.cc",
    "xla_ffi/cuda/peer_module.cc",
    "xla_ffi/cuda/plan.cc",
    "xla_ffi/cuda/quantize.cc",
    "xla_ffi/cuda/swiglu.cc",
]

CUDA_FFI_HEADERS = [
    "xla_ffi/cuda/exchange.h",
    "xla_ffi/cuda/handlers.h",
    "xla_ffi/cuda/peer_groups.h",
    "xla_ffi/cuda/peer_module.h",
    "xla_ffi/cuda/profile_range.h",
    "xla_ffi/cuda/row_groups.h",
    "xla_ffi/ffi_util.h",
]

# NVSHMEM's memory, what goes over it between nodes, and their nanobind module.
NVSHMEM_SOURCES = [
    "csrc/ep/two_hop_config.cc",
    "csrc/ep/two_hop_nvshmem.cu",
    "csrc/transport/nvshmem.cu",
    "xla_ffi/nvshmem/module.cc",
]

# Virtual nodes of one host: nothing of NVSHMEM's is called.
MAPPED_NODES_SOURCES = ["csrc/ep/two_hop_mapped.cu"]

NVSHMEM_HEADERS = [
    "csrc/ep/two_hop_nvshmem.h",
    "csrc/transport/nvshmem.h",
]

# The emulator of CUDA kernels on the CPU.
SIMT_SOURCES = [
    "tests/simt/access_hooks.cc",
    "tests/simt/barriers.cc",
    "tests/simt/context.cc",
    "tests/simt/copies.cc",
    "tests/simt/flags.cc",
    "tests/simt/memory.cc",
    "tests/simt/order.cc",
    "tests/simt/scheduler.cc",
]

SIMT_HEADERS = [
    "tests/simt/context.h",
    "tests/simt/device.h",
    "tests/simt/kernel_api.h",
    "tests/simt/order.h",
    "tests/simt/override/csrc/core/launch.cuh",
    "tests/simt/override/csrc/core/ptx.h",
    "tests/simt/override/cuda_bf16.h",
    "tests/simt/override/cuda_fp16.h",
    "tests/simt/override/cuda_fp8.h",
    "tests/simt/override/cuda_runtime.h",
    "tests/simt/override/cuda_runtime_api.h",
    "tests/simt/override/number_conversion.h",
    "tests/simt/runtime.h",
    "tests/simt/simt_machine.h",
    "tests/simt/site.h",
    "tests/simt/toy_kernels.cuh",
]

# Kernels that are tested in it.
SIMT_KERNEL_SOURCES = [
    "csrc/core/error_record.cc",
    "csrc/ep/low_latency_relayed.cc",
    "tests/simt/exchange_kernels.cc",
    "tests/simt/low_latency_kernels.cc",
]

SIMT_TESTS = [
    "tests/simt/exchange_simt_test.cc",
    "tests/simt/low_latency_relay_simt_test.cc",
    "tests/simt/low_latency_simt_test.cc",
    "tests/simt/simt_test.cc",
    "tests/simt/two_hop_combine_simt_test.cc",
    "tests/simt/two_hop_dispatch_simt_test.cc",
    "tests/simt/two_hop_plan_simt_test.cc",
    "tests/simt/two_hop_simt_test.cc",
]
