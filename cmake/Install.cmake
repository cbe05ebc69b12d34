# `cmake --install build --prefix DIR`: the program, the headers, libmoesaic.so and what find_package(moesaic) reads.
# The library needs the torch and pyarrow wheels where they were at build time; -DMOESAIC_TORCH_DIR says otherwise.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# moesaic_whole_library(<name> <sources>): a shared library of every folder and these.
function(moesaic_whole_library name)
  add_library(${name} SHARED ${ARGN})
  get_property(_folders GLOBAL PROPERTY MOESAIC_FOLDERS)
  foreach(_folder ${_folders})
    target_sources(${name} PRIVATE "$<TARGET_OBJECTS:${_folder}>")
  endforeach()
  target_link_libraries(${name} PRIVATE moesaic::torch moesaic::arrow moesaic_bridge nlohmann_json::nlohmann_json
    spdlog::spdlog fmt::fmt yaml-cpp)
endfunction()

moesaic_whole_library(moesaic_shared)
set_target_properties(moesaic_shared PROPERTIES OUTPUT_NAME moesaic SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
  VERSION ${PROJECT_VERSION})

set(_package "${CMAKE_INSTALL_LIBDIR}/cmake/moesaic")
configure_package_config_file(cmake/moesaicConfig.cmake.in "${CMAKE_BINARY_DIR}/moesaicConfig.cmake"
  INSTALL_DESTINATION "${_package}" PATH_VARS CMAKE_INSTALL_INCLUDEDIR CMAKE_INSTALL_LIBDIR)
write_basic_package_version_file("${CMAKE_BINARY_DIR}/moesaicConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(TARGETS moesaic_cli moesaic_shared
  RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}" LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(DIRECTORY moesaic DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" FILES_MATCHING PATTERN "*.h" PATTERN "pch.h" EXCLUDE
  PATTERN "gloo_names" EXCLUDE PATTERN "kernels_body.h" EXCLUDE PATTERN "bridge_call.h" EXCLUDE PATTERN "bridge_text.h" EXCLUDE)
install(FILES "${CMAKE_BINARY_DIR}/moesaicConfig.cmake" "${CMAKE_BINARY_DIR}/moesaicConfigVersion.cmake"
  DESTINATION "${_package}")
