# The module _wideep_nvshmem: NVSHMEM's memory and what goes over it between nodes. Included when WIDEEP_NVSHMEM is on.
# The library itself is not copied: it comes from the wheel nvidia-nvshmem-cu13, which Python loads before the module.
set(WIDEEP_NVSHMEM_HOME "" CACHE PATH
    "Folder with NVSHMEM's include and lib; default: that of the building Python's nvidia-nvshmem-cu13")
if(NOT WIDEEP_NVSHMEM_HOME)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import nvidia.nvshmem as m; print(list(m.__path__)[0])"
    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE WIDEEP_NVSHMEM_HOME RESULT_VARIABLE no_nvshmem ERROR_QUIET)
  if(no_nvshmem)
    message(FATAL_ERROR "WIDEEP_NVSHMEM needs NVSHMEM 3.4.5 or newer: pip install 'nvidia-nvshmem-cu13>=3.4.5' and "
                        "build with --no-build-isolation, or set WIDEEP_NVSHMEM_HOME")
  endif()
endif()
read_source_list(NVSHMEM_SOURCES)

# Kernels that call nothing of NVSHMEM's: compiled as a whole, since separate compilation keeps the compiler from inlining.
read_source_list(MAPPED_NODES_SOURCES)
add_library(wideep_mapped_nodes STATIC ${MAPPED_NODES_SOURCES})
target_include_directories(wideep_mapped_nodes PRIVATE ${CMAKE_SOURCE_DIR})

nanobind_add_module(_wideep_nvshmem NB_STATIC NOMINSIZE ${NVSHMEM_SOURCES})
# Device code calls NVSHMEM's, which is linked to it here.
set_target_properties(_wideep_nvshmem PROPERTIES CUDA_SEPARABLE_COMPILATION ON CUDA_RESOLVE_DEVICE_SYMBOLS ON)
target_include_directories(_wideep_nvshmem PRIVATE ${CMAKE_SOURCE_DIR})
# What its kernels call is compiled on its own, for registers that a block of 512 threads has.
set_source_files_properties(csrc/ep/two_hop_nvshmem.cu PROPERTIES COMPILE_OPTIONS -maxrregcount=128)
# NVSHMEM's headers want those of CCCL, which lie in a folder of their own from CUDA 13 on.
target_include_directories(_wideep_nvshmem SYSTEM PRIVATE ${WIDEEP_NVSHMEM_HOME}/include)
foreach(folder IN LISTS CUDAToolkit_INCLUDE_DIRS)
  target_include_directories(_wideep_nvshmem SYSTEM PRIVATE ${folder}/cccl)
endforeach()
target_link_libraries(_wideep_nvshmem PRIVATE wideep_mapped_nodes ${WIDEEP_NVSHMEM_HOME}/lib/libnvshmem_device.a
                                              ${WIDEEP_NVSHMEM_HOME}/lib/libnvshmem_host.so.3 CUDA::cudart_static)
set_target_properties(_wideep_nvshmem PROPERTIES SKIP_BUILD_RPATH ON)
install(TARGETS _wideep_nvshmem LIBRARY DESTINATION jax_wideep)
