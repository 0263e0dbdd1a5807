# The kernels' sources, compiled once per instruction set. Which of them runs is chosen at run time
# (csrc/optimizer/instruction_set.cpp), so nothing outside these objects may be compiled with their flags.
#
# Contraction is off and errno/traps are given up, because that is all the vectoriser needs to turn sqrt and
# the selects into vector code; both leave every result bit as IEEE 754 says.

include(CheckCXXSourceCompiles)
check_cxx_source_compiles("
#if !(defined(__x86_64__) && defined(__GNUC__))
#error other
#endif
int main() { return __builtin_cpu_supports(\"avx512f\"); }" SLIDECORE_X86_KERNELS)

function(slidecore_kernel_set name)
  set(target slidecore_kernels_${name})
  file(GLOB kernel_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/optimizer/kernels/*.cpp)
  add_library(${target} OBJECT ${kernel_sources})
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden)
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
  target_compile_definitions(${target} PRIVATE SLIDECORE_KERNEL_SET=${name})
  target_compile_options(${target} PRIVATE
    -Wall -Wextra -Wpedantic -Wshadow
    $<$<NOT:$<CONFIG:Debug>>:-O3> -ffp-contract=off -fno-math-errno -fno-trapping-math ${ARGN})
  if(SLIDECORE_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${SLIDECORE_SANITIZE} -fno-omit-frame-pointer)
  endif()
  target_sources(slidecore_optimizer PRIVATE $<TARGET_OBJECTS:${target}>)
endfunction()

# The scalars that the kernels take are computed outside of them.
target_compile_options(slidecore_optimizer PRIVATE -ffp-contract=off)
slidecore_kernel_set(generic)
if(SLIDECORE_X86_KERNELS)
  slidecore_kernel_set(avx2 -mavx2)
  slidecore_kernel_set(avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
  target_compile_definitions(slidecore_optimizer PRIVATE SLIDECORE_X86_KERNELS)
endif()
