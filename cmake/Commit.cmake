# moesaic_commit(<target>): what the target was built from, as kCommit of cli/commit.h, looked at in every build.
function(moesaic_commit target)
  set(_made "${CMAKE_BINARY_DIR}/commit.cpp")
  add_custom_target(moesaic_commit_file
    COMMAND "${CMAKE_COMMAND}" "-DSOURCE=${CMAKE_SOURCE_DIR}" "-DMADE=${_made}" -P "${CMAKE_SOURCE_DIR}/cmake/Commit.cmake"
    BYPRODUCTS "${_made}"
    COMMENT "Looking at the commit"
    VERBATIM)
  target_sources(${target} PRIVATE "${_made}")
  set_source_files_properties("${_made}" PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
endfunction()

# As a script: writes MADE where the commit of SOURCE is another than it says.
if(CMAKE_SCRIPT_MODE_FILE)
  cmake_minimum_required(VERSION 3.25)
  set(_commit "no commit")
  if(EXISTS "${SOURCE}/.git")
    execute_process(COMMAND git -C "${SOURCE}" describe --always --dirty --abbrev=12 "--exclude=*"
      OUTPUT_VARIABLE _found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE _failed)
    if(NOT _failed)
      set(_commit "${_found}")
    endif()
  endif()
  file(CONFIGURE OUTPUT "${MADE}" @ONLY CONTENT "// Made by cmake/Commit.cmake.
#include \"cli/commit.h\"

namespace moesaic::cli {

const char* const kCommit = \"@_commit@\";

}  // namespace moesaic::cli
")
endif()
