# MOESAIC_UPLOT_DIR: the folder of uPlot (MIT), the plotting library of the pages, as the youplot wheel carries it.
file(GLOB _site_packages "${MOESAIC_VENV}/lib/python3*/site-packages")
set(MOESAIC_UPLOT_DIR "${_site_packages}/youplot/vendor" CACHE PATH "folder of uplot.iife.min.js and uplot.min.css")
if(NOT EXISTS "${MOESAIC_UPLOT_DIR}/uplot.iife.min.js")
  message(FATAL_ERROR "uPlot: ${MOESAIC_UPLOT_DIR}/uplot.iife.min.js is missing. Run tools/setup first.")
endif()
