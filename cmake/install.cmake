# Installs headers, static libraries and a CMake package. The layout is the same under `cmake --install`'s prefix and
# in a wheel, where the prefix is the package's own directory (wheel.install-dir in pyproject.toml).
include(CMakePackageConfigHelpers)
if(SKBUILD)
  set(CMAKE_INSTALL_LIBDIR lib)  # not lib64 or lib/<triplet>: a wheel is the same on every distribution
endif()
include(GNUInstallDirs)

set(slidecore_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/slidecore)
get_property(slidecore_libraries GLOBAL PROPERTY SLIDECORE_LIBRARIES)
foreach(library IN LISTS slidecore_libraries)
  target_compile_features(${library} PUBLIC cxx_std_20)  # the headers need it of whoever includes them
endforeach()

install(TARGETS ${slidecore_libraries} EXPORT slidecoreTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/csrc/include/slidecore DESTINATION include FILES_MATCHING PATTERN "*.h")
install(EXPORT slidecoreTargets NAMESPACE slidecore:: DESTINATION ${slidecore_cmake_dir})

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/slidecoreConfig.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/slidecoreConfig.cmake INSTALL_DESTINATION ${slidecore_cmake_dir})
# Before 1.0 a minor version may break the interface.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/slidecoreConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/slidecoreConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/slidecoreConfigVersion.cmake
  DESTINATION ${slidecore_cmake_dir})
