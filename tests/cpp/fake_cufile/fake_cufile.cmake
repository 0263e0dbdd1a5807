# Fake cuFile libraries, found by the tests in fake_driver/ beside their executable. The incomplete one lacks two
# functions (and the one that need not be there).
function(slidecore_fake_cufile target output)
  slidecore_fake_driver(${target} ../fake_cufile/fake_cufile.cpp ${output} ${ARGN})
endfunction()

slidecore_fake_cufile(fake_cufile fake_cufile)
slidecore_fake_cufile(fake_cufile_incomplete fake_cufile_incomplete FAKE_INCOMPLETE)

if(TARGET gpu_direct_disk_test)
  add_dependencies(gpu_direct_disk_test fake_cufile fake_cufile_incomplete)
endif()
