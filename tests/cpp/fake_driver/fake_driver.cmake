# Fake CUDA and HIP driver libraries, found by the tests in fake_driver/ beside their executable. The incomplete
# ones lack two functions.
set(SLIDECORE_FAKE_DRIVER_DIR ${CMAKE_CURRENT_LIST_DIR})

function(slidecore_fake_driver target source output)
  add_library(${target} SHARED ${SLIDECORE_FAKE_DRIVER_DIR}/${source})
  # No soname: the loader may then find a loaded one by its path only, as tests of that search need.
  set_target_properties(${target} PROPERTIES OUTPUT_NAME ${output} NO_SONAME ON CXX_VISIBILITY_PRESET hidden
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/fake_driver)
  target_compile_definitions(${target} PRIVATE ${ARGN})
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow)
  if(SLIDECORE_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${SLIDECORE_SANITIZE} -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=${SLIDECORE_SANITIZE})
  endif()
endfunction()

slidecore_fake_driver(fake_cuda fake_cuda.cpp fake_cuda)
slidecore_fake_driver(fake_cuda_incomplete fake_cuda.cpp fake_cuda_incomplete FAKE_INCOMPLETE)
slidecore_fake_driver(fake_hip fake_hip.cpp amdhip64)
slidecore_fake_driver(fake_hip_incomplete fake_hip.cpp fake_hip_incomplete FAKE_INCOMPLETE)

# These tests look at internal headers too.
foreach(test device_test fake_driver_test memory_test scheduler_deferred_test scheduler_driver_test
        scheduler_hazards_test)
  if(TARGET ${test})
    target_include_directories(${test} PRIVATE ${SLIDECORE_FAKE_DRIVER_DIR}/../../../csrc)
    add_dependencies(${test} fake_cuda fake_cuda_incomplete fake_hip fake_hip_incomplete)
  endif()
endforeach()
