# The emulator of CUDA kernels on the CPU (tests/simt), and the tests that run kernels in it.
read_source_list(SIMT_SOURCES)
read_source_list(SIMT_KERNEL_SOURCES)
read_source_list(SIMT_TESTS)

add_library(simt STATIC ${SIMT_SOURCES})
# The headers in override/ stand in for CUDA's, and for those of csrc that speak to the hardware.
target_include_directories(simt BEFORE PUBLIC ${CMAKE_SOURCE_DIR}/tests/simt/override)
target_link_libraries(simt PUBLIC wideep_host ${CMAKE_DL_LIBS})

# Kernels tell the emulator of their accesses: the calls that this sanitizer puts into the code go to
# access_hooks.cc, not to the sanitizer's library, which is not linked. -g1: reports name source lines.
# Kernels look at rows through pointers of other types, as CUDA's compiler allows.
set(SIMT_KERNEL_OPTIONS -fsanitize=thread -fno-strict-aliasing -Wno-unknown-pragmas -O2 -g1)
add_library(simt_kernels STATIC ${SIMT_KERNEL_SOURCES})
target_compile_options(simt_kernels PRIVATE ${SIMT_KERNEL_OPTIONS})
target_link_libraries(simt_kernels PUBLIC simt)

foreach(test_source IN LISTS SIMT_TESTS)
  get_filename_component(test_name ${test_source} NAME_WE)
  add_executable(${test_name} ${test_source})
  target_compile_options(${test_name} PRIVATE ${SIMT_KERNEL_OPTIONS})
  target_link_libraries(${test_name} PRIVATE simt_kernels)
  add_test(NAME ${test_name} COMMAND ${test_name})
endforeach()
