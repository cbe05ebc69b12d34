# moesaic_embed(<target> <file>...): text files as constants of the target, made anew when a file changes.
#
#   moesaic/eval/pages/routes.html   is   moesaic::eval::kRoutesHtml, a std::string_view
#
# declared in moesaic/eval/pages.h: the folder of the files names the header and, without its last part, the namespace.
# moesaic_embed_as(<target> <folder> <name> <file>): the same for a file from elsewhere, as if it were <folder>/<name>.
# To be called behind the target's definition, from the top of the source tree.
function(moesaic_embed target)
  foreach(_file ${ARGN})
    get_filename_component(_folder "${_file}" DIRECTORY)
    get_filename_component(_name "${_file}" NAME)
    moesaic_embed_as(${target} "${_folder}" "${_name}" "${CMAKE_SOURCE_DIR}/${_file}")
  endforeach()
endfunction()

function(moesaic_embed_as target folder name file)
  set(_made "${CMAKE_BINARY_DIR}/embedded/${folder}/${name}.cpp")
  add_custom_command(
    OUTPUT "${_made}"
    COMMAND "${CMAKE_COMMAND}" "-DFILE=${file}" "-DFOLDER=${folder}" "-DNAME=${name}" "-DMADE=${_made}"
      -P "${CMAKE_SOURCE_DIR}/cmake/Embed.cmake"
    DEPENDS "${file}" "${CMAKE_SOURCE_DIR}/cmake/Embed.cmake"
    COMMENT "Embedding ${name}"
    VERBATIM)
  target_sources(${target} PRIVATE "${_made}")
  set_source_files_properties("${_made}" PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
endfunction()

# As a script: writes MADE, the constant of FILE.
if(CMAKE_SCRIPT_MODE_FILE)
  cmake_minimum_required(VERSION 3.25)
  get_filename_component(_above "${FOLDER}" DIRECTORY)
  string(REPLACE "/" "::" _namespace "${_above}")
  string(REGEX MATCHALL "[A-Za-z0-9]+" _words "${NAME}")
  set(_constant k)
  foreach(_word ${_words})
    string(SUBSTRING "${_word}" 0 1 _first)
    string(SUBSTRING "${_word}" 1 -1 _rest)
    string(TOUPPER "${_first}" _first)
    string(APPEND _constant "${_first}${_rest}")
  endforeach()
  # As bytes: no character of the file means anything to the compiler.
  file(READ "${FILE}" _bytes HEX)
  string(REGEX REPLACE "(................................................................)" "\\1\n" _bytes "${_bytes}")
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "'\\\\x\\1'," _bytes "${_bytes}")
  file(CONFIGURE OUTPUT "${MADE}" @ONLY CONTENT "// Made of ${NAME} by cmake/Embed.cmake.
#include \"@FOLDER@.h\"

namespace @_namespace@ {

static const char kBytes[] = {
@_bytes@'\\0'};
const std::string_view @_constant@(kBytes, sizeof(kBytes) - 1);

}  // namespace @_namespace@
")
endif()
