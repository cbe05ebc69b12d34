# In an empty folder: cmake -DPROGRAM=.../moesaic -DLICENSES=.../licenses -DVERSION=0.1.0 -P .../cmake/Dist.cmake
#
# Leaves moesaic-VERSION-linux-x86_64/: the program with every library it loads but those of C and C++, which runs from
# any place; the same as .tar.zst; and SHA256SUMS of that.
cmake_minimum_required(VERSION 3.25)
get_filename_component(_source "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)
execute_process(COMMAND uname -m OUTPUT_VARIABLE _processor OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(_name "moesaic-${VERSION}-linux-${_processor}")
set(_folder "${CMAKE_CURRENT_BINARY_DIR}/${_name}")

# The C library is the system's, as its loader is; so is libstdc++, since a copy of it would need this system's C library.
file(GET_RUNTIME_DEPENDENCIES EXECUTABLES "${PROGRAM}"
  RESOLVED_DEPENDENCIES_VAR _libraries UNRESOLVED_DEPENDENCIES_VAR _missing
  PRE_EXCLUDE_REGEXES "^ld-linux" "^lib(c|m|dl|rt|util|pthread|stdc\\+\\+|gcc_s)\\.so")
if(_missing)
  message(FATAL_ERROR "${PROGRAM}: not found of what it loads: ${_missing}")
endif()
file(MAKE_DIRECTORY "${_folder}/bin" "${_folder}/lib")
foreach(_library ${_libraries})
  file(REAL_PATH "${_library}" _file)
  get_filename_component(_soname "${_library}" NAME)
  file(COPY_FILE "${_file}" "${_folder}/lib/${_soname}")
endforeach()

find_program(_strip strip REQUIRED)
execute_process(COMMAND "${_strip}" -o "${_folder}/bin/moesaic" "${PROGRAM}" COMMAND_ERROR_IS_FATAL ANY)
file(RPATH_SET FILE "${_folder}/bin/moesaic" NEW_RPATH "$ORIGIN/../lib")

file(GLOB _pages "${_source}/docs/*.md")
file(COPY ${_pages} DESTINATION "${_folder}/docs")
file(COPY "${_source}/README.md" "${_source}/CHANGELOG.md" "${_source}/LICENSE" "${_source}/THIRD_PARTY.md"
  "${_source}/recipes" "${LICENSES}" DESTINATION "${_folder}")

file(ARCHIVE_CREATE OUTPUT "${_name}.tar.zst" PATHS "${_name}" FORMAT gnutar COMPRESSION Zstd COMPRESSION_LEVEL 9)
file(SHA256 "${_name}.tar.zst" _sum)
file(WRITE SHA256SUMS "${_sum}  ${_name}.tar.zst\n")
