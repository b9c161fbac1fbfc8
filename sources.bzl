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
    "csrc/transport/host_rendezvous.cc",
]

HOST_HEADERS = [
    "csrc/core/dtype.h",
    "csrc/core/elastic_threads.h",
    "csrc/core/float_env.h",
    "csrc/core/status.h",
    "csrc/core/worker_pool.h",
    "csrc/ep/combine_host.h",
    "csrc/ep/dispatch_host.h",
    "csrc/ep/low_latency_host.h",
    "csrc/ep/plan_host.h",
    "csrc/ep/row_kernels.h",
    "csrc/ep/token_tasks.h",
    "csrc/transport/host_rendezvous.h",
]

# Compiled once per instruction set; row_kernels_select.cc picks at run time.
ROW_KERNEL_SOURCE = [
    "csrc/ep/row_kernels.cc",
]

# FFI handlers and the nanobind module of the CPU backend.
CPU_FFI_SOURCES = [
    "xla_ffi/cpu/combine.cc",
    "xla_ffi/cpu/dispatch.cc",
    "xla_ffi/cpu/group_registry.cc",
    "xla_ffi/cpu/low_latency.cc",
    "xla_ffi/cpu/module.cc",
    "xla_ffi/cpu/plan.cc",
]

CPU_FFI_HEADERS = [
    "xla_ffi/cpu/group_registry.h",
    "xla_ffi/cpu/handlers.h",
    "xla_ffi/cpu/meet.h",
    "xla_ffi/ffi_util.h",
]

CPP_TESTS = [
    "tests/cpp/exchange_test.cc",
    "tests/cpp/low_latency_test.cc",
    "tests/cpp/plan_test.cc",
    "tests/cpp/rendezvous_test.cc",
    "tests/cpp/row_kernels_test.cc",
    "tests/cpp/worker_pool_test.cc",
]

CPP_TEST_HEADERS = [
    "tests/cpp/check.h",
    "tests/cpp/exchange_testing.h",
    "tests/cpp/number_formats.h",
]
