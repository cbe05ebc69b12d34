// The kernels for processors with AVX2 and FMA; the flags are in CMakeLists.txt.
#define MOESAIC_KERNELS kAvx2Kernels
#ifdef __AVX2__
#include "moesaic/nn/kernels_body.h"
#else
#include "moesaic/nn/kernel_table.h"
namespace moesaic::nn {
const KernelTable kAvx2Kernels = {};
}
#endif
