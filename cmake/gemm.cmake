# csrc/gemm, its tests and its benchmark.
read_source_list(GEMM_CUDA_SOURCES)

add_library(wideep_gemm STATIC ${GEMM_CUDA_SOURCES})
target_include_directories(wideep_gemm PUBLIC ${CMAKE_SOURCE_DIR})
target_link_libraries(wideep_gemm PUBLIC CUDA::cudart_static)

if(WIDEEP_TESTS)
  add_executable(gemm_test tests/gpu/gemm_test.cu)
  add_executable(swiglu_test tests/gpu/swiglu_test.cu)
  add_executable(gemm_benchmark benchmarks/gemm.cu)
  foreach(program gemm_test swiglu_test gemm_benchmark)
    target_link_libraries(${program} PRIVATE wideep_gemm)
  endforeach()
endif()
