# Imported target moesaic::torch from the PyPI wheel's folder. find_package(Torch) is not used: in a CUDA
# wheel it demands a CUDA toolkit. Only the CPU libraries are linked; CUDA is loaded at run time by dlopen.
set(MOESAIC_VENV "${CMAKE_SOURCE_DIR}/.venv" CACHE PATH "virtual environment made by tools/setup")
file(GLOB _site_packages "${MOESAIC_VENV}/lib/python3*/site-packages")
set(MOESAIC_TORCH_DIR "${_site_packages}/torch" CACHE PATH "folder of the torch 2.11.0 wheel")
if(NOT EXISTS "${MOESAIC_TORCH_DIR}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "LibTorch: ${MOESAIC_TORCH_DIR}/lib/libtorch_cpu.so is missing. Run tools/setup first.")
endif()
file(STRINGS "${MOESAIC_TORCH_DIR}/version.py" _torch_version REGEX "^__version__")
if(NOT _torch_version MATCHES "2\\.11\\.0")
  message(FATAL_ERROR "LibTorch: found ${_torch_version}, expected 2.11.0. Run tools/setup again.")
endif()
file(GLOB _cuda_lib_dirs "${_site_packages}/nvidia/*/lib" "${_site_packages}/nvidia/cu13/lib")
list(JOIN _cuda_lib_dirs ":" _cuda_rpath)

add_library(moesaic_torch INTERFACE)
add_library(moesaic::torch ALIAS moesaic_torch)
# Searched after the system's headers: the wheel brings its own copy of fmt, which must not hide the one spdlog needs.
target_compile_options(moesaic_torch INTERFACE
  "SHELL:-idirafter ${MOESAIC_TORCH_DIR}/include"
  "SHELL:-idirafter ${MOESAIC_TORCH_DIR}/include/torch/csrc/api/include")
target_compile_definitions(moesaic_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
target_link_libraries(moesaic_torch INTERFACE "${MOESAIC_TORCH_DIR}/lib/libtorch_cpu.so" "${MOESAIC_TORCH_DIR}/lib/libc10.so")
target_link_options(moesaic_torch INTERFACE
  "LINKER:--no-as-needed" "LINKER:--allow-shlib-undefined" "LINKER:-rpath,${MOESAIC_TORCH_DIR}/lib:${_cuda_rpath}")
