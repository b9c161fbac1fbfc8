# The exchange on CUDA: csrc/ep's kernels, csrc/transport, and their tests.
read_source_list(EXCHANGE_CUDA_SOURCES)

add_library(wideep_exchange STATIC ${EXCHANGE_CUDA_SOURCES})
target_include_directories(wideep_exchange PUBLIC ${CMAKE_SOURCE_DIR})
target_link_libraries(wideep_exchange PUBLIC CUDA::cudart_static)

if(WIDEEP_TESTS AND EXISTS ${CMAKE_SOURCE_DIR}/tests/gpu/exchange_test.cu)
  # Against the host's implementation.
  add_executable(exchange_gpu_test tests/gpu/exchange_test.cu)
  target_link_libraries(exchange_gpu_test PRIVATE wideep_exchange wideep_host)
endif()
if(WIDEEP_TESTS)
  add_executable(two_hop_gpu_test tests/gpu/two_hop_test.cu)
  target_link_libraries(two_hop_gpu_test PRIVATE wideep_exchange wideep_host)
  add_executable(low_latency_gpu_test tests/gpu/low_latency_test.cu)
  target_link_libraries(low_latency_gpu_test PRIVATE wideep_exchange wideep_host)
  add_executable(exchange_benchmark benchmarks/exchange.cu)
  target_link_libraries(exchange_benchmark PRIVATE wideep_exchange wideep_host)
  add_executable(low_latency_benchmark benchmarks/low_latency.cu)
  target_link_libraries(low_latency_benchmark PRIVATE wideep_exchange)
  add_executable(peer_copy_benchmark benchmarks/peer_copy.cu)
endif()
