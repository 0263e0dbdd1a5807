# GoogleTest: the installed one, or else a pinned release from its repository.
find_package(GTest CONFIG QUIET)
if(NOT TARGET GTest::gtest_main)
  set(tag v1.17.0)
  set(source ${CMAKE_BINARY_DIR}/googletest-${tag})
  if(NOT EXISTS ${source}/CMakeLists.txt)
    # Not FetchContent: where there is no network its report hides what to do about it.
    message(STATUS "GoogleTest is not installed; downloading ${tag}")
    file(REMOVE_RECURSE ${source})
    find_package(Git QUIET)
    set(failed 1)
    if(GIT_FOUND)
      execute_process(COMMAND ${GIT_EXECUTABLE} -c advice.detachedHead=false clone --quiet --depth 1 --branch ${tag}
        https://github.com/google/googletest.git ${source} RESULT_VARIABLE failed)
    endif()
    if(failed)
      message(FATAL_ERROR "The C++ tests need GoogleTest, which is neither installed nor could be downloaded. Install it:\n"
        "  Debian, Ubuntu: apt-get install libgtest-dev\n  Fedora: dnf install gtest-devel\n  Arch: pacman -S gtest")
    endif()
  endif()
  set(INSTALL_GTEST OFF CACHE BOOL "")
  set(BUILD_GMOCK OFF CACHE BOOL "")
  add_subdirectory(${source} ${CMAKE_BINARY_DIR}/googletest EXCLUDE_FROM_ALL)
endif()
