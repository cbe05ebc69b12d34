# What the Python package loads: torch custom classes over the whole library.
file(GLOB _binding CONFIGURE_DEPENDS python/binding/*.cpp)
moesaic_whole_library(moesaic_python ${_binding})
target_precompile_headers(moesaic_python REUSE_FROM moesaic_pch)
target_include_directories(moesaic_python PRIVATE "${CMAKE_SOURCE_DIR}")

# The program over that library, so that a wheel holds the code once.
add_executable(moesaic_wheel_program $<TARGET_OBJECTS:moesaic_cli> $<TARGET_OBJECTS:moesaic_demos>)
target_link_libraries(moesaic_wheel_program PRIVATE moesaic_python moesaic::torch spdlog::spdlog fmt::fmt)
set_target_properties(moesaic_wheel_program PROPERTIES OUTPUT_NAME moesaic RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/python")

# The wheel: scikit-build-core installs this component beside python/moesaic/, auditwheel adds the other libraries.
install(TARGETS moesaic_python moesaic_wheel_program
  LIBRARY DESTINATION moesaic/lib COMPONENT python EXCLUDE_FROM_ALL
  RUNTIME DESTINATION moesaic/bin COMPONENT python EXCLUDE_FROM_ALL)
install(CODE [[
  foreach(_file lib/libmoesaic_python.so bin/moesaic)
    file(RPATH_SET FILE "${CMAKE_INSTALL_PREFIX}/moesaic/${_file}" NEW_RPATH "$ORIGIN/../lib:$ORIGIN/../../torch/lib")
  endforeach()
]] COMPONENT python EXCLUDE_FROM_ALL)
