#include "moesaic/ranks/deal.h"

namespace moesaic::ranks {

std::vector<Json> deal(Group& group, int64_t count, const std::function<Json(int64_t)>& work) {
  std::vector<Json> own;
  const auto [first, last] = group.share(count, group.rank());
  for (int64_t i = first; i < last; ++i) own.push_back(work(i));
  if (group.size() == 1) return own;
  std::string bytes;
  Json::to_cbor(own, bytes);
  std::vector<Json> all;
  for (const std::string& of_rank : group.gather(bytes)) {
    Json done = Json::from_cbor(of_rank);
    for (Json& each : done) all.push_back(std::move(each));
  }
  return all;
}

}  // namespace moesaic::ranks
