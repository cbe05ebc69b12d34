// The texts of data sets, apart from how a model is to see them: what a tokenizer is trained on.
#pragma once
#include <string>
#include <vector>

#include "moesaic/data/dataset.h"

namespace moesaic::data {

/// Prompts, answers and messages of the data sets' rows, in file order; each data set gives an equal share of
/// `max_bytes` at most. Throws DataError for a damaged row, with its place.
std::vector<std::string> plain_texts(const std::vector<DatasetConfig>& datasets, size_t max_bytes);

}  // namespace moesaic::data
