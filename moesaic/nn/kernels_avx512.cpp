// The kernels for processors with AVX512 and VNNI; the flags are in CMakeLists.txt.
#define MOESAIC_KERNELS kAvx512Kernels
#ifdef __AVX512VNNI__
#include "moesaic/nn/kernels_body.h"
#else
#include "moesaic/nn/kernel_table.h"
namespace moesaic::nn {
const KernelTable kAvx512Kernels = {};
}
#endif
