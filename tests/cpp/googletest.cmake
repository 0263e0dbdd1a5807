# GoogleTest: the installed one, or else a pinned release from its repository.
find_package(GTest CONFIG QUIET)
if(NOT TARGET GTest::gtest_main)
  message(NOTICE "GoogleTest is not installed; downloading it. Without a network, install it first:\n"
    "  Debian, Ubuntu: apt-get install libgtest-dev\n  Fedora: dnf install gtest-devel\n"
    "  Arch: pacman -S gtest")
  include(FetchContent)
  set(INSTALL_GTEST OFF CACHE BOOL "" FORCE)
  set(BUILD_GMOCK OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(googletest GIT_REPOSITORY https://github.com/google/googletest.git GIT_TAG v1.17.0
    GIT_SHALLOW ON)
  FetchContent_MakeAvailable(googletest)
endif()
