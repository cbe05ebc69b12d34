// What reading and writing safetensors have in common: the names of number formats and the header's limit.
#pragma once
#include <ATen/core/Tensor.h>

#include <string_view>

namespace moesaic::formats {

inline constexpr size_t kMaxHeaderBytes = 100'000'000;

struct StoredDtype {
  const char* name;
  at::ScalarType dtype;
};
inline constexpr StoredDtype kStoredDtypes[] = {
    {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"I64", at::kLong},
    {"I32", at::kInt},    {"I16", at::kShort}, {"I8", at::kChar},  {"U8", at::kByte},       {"BOOL", at::kBool},
};

/// nullptr when there is none.
inline const StoredDtype* find_stored_dtype(std::string_view name) {
  for (const StoredDtype& entry : kStoredDtypes) {
    if (name == entry.name) return &entry;
  }
  return nullptr;
}

}  // namespace moesaic::formats
