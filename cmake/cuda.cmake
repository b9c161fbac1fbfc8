# The CUDA part: libraries without XLA or Python, their tests and benchmarks, and the module _wideep_cuda.
# Included by the top level when WIDEEP_CUDA is on. One file of targets for each part: gemm.cmake, ..
set(WIDEEP_CUDA_ARCH "90a" CACHE STRING "CUDA architecture of the kernels; they are written for 90a")
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES ${WIDEEP_CUDA_ARCH})
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
# The static runtime: a wheel brings its own, and the driver comes at run time.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

include(${CMAKE_CURRENT_LIST_DIR}/gemm.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/exchange.cmake)

# ---- xla_ffi: handlers and the Python module; the host compiler only ----
if(WIDEEP_PYTHON)
  read_source_list(CUDA_FFI_SOURCES)
  nanobind_add_module(_wideep_cuda NB_STATIC NOMINSIZE ${CUDA_FFI_SOURCES})
  target_include_directories(_wideep_cuda SYSTEM PRIVATE ${WIDEEP_FFI_INCLUDE})
  target_link_libraries(_wideep_cuda PRIVATE wideep_gemm wideep_exchange)
  install(TARGETS _wideep_cuda LIBRARY DESTINATION jax_wideep)
  if(WIDEEP_NVSHMEM)
    include(${CMAKE_CURRENT_LIST_DIR}/nvshmem.cmake)
  endif()
endif()
