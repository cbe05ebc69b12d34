// Who multiplies matrices in float32: own kernels or the library.
#pragma once
#include <string>

namespace moesaic::cli {

/// Sets nn::products() and says why: as the environment's MOESAIC_PRODUCTS says (own, library), or as is faster here,
/// which is measured once per processor, number of threads and program. Throws UsageError.
std::string choose_products();

}  // namespace moesaic::cli
