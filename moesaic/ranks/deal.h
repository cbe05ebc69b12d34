// Independent pieces of work, divided over the ranks.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/ranks/group.h"

namespace moesaic::ranks {

/// What `work` gives of 0 .. count-1, each done by one rank, the same at every rank; NaN and bytes that are no UTF-8
/// come through.
std::vector<Json> deal(Group& group, int64_t count, const std::function<Json(int64_t)>& work);

}  // namespace moesaic::ranks
