// torch.save's files ("pytorch_model.bin"): a zip archive with a pickle that describes the tensors. The pickle is read,
// never executed.
#pragma once
#include "moesaic/formats/safetensors.h"

namespace moesaic::formats {

/// The tensors of a saved state dict by name, as read-only views of the mapped file. What a pickle may name is a list
/// of three constructors and the storage types; anything else is refused with its name. Sizes, strides and offsets are
/// checked against the bytes that are there. Throws FormatError.
TensorMap read_torch_file(const std::filesystem::path& path);
TensorMap read_torch_file(const Bytes& bytes);

}  // namespace moesaic::formats
