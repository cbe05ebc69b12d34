// The kernels for any processor.
#define MOESAIC_KERNELS kGenericKernels
#include "moesaic/nn/kernels_body.h"
