#include "moesaic/adapters/mix.h"

#include "moesaic/adapters/replacements.h"
#include "moesaic/base/check.h"
#include "moesaic/base/text.h"
#include "moesaic/formats/config.h"

namespace moesaic::adapters {
namespace {

constexpr const char *kA = ".lora_A.weight", *kB = ".lora_B.weight", *kRouter = ".router.weight";

std::string last_name(const std::string& site) { return site.substr(site.rfind('.') + 1); }

/// Throws UsageError for parts of different bases; where fingerprints can't tell, other names are a warning.
void check_bases(const std::vector<MixPart>& parts) {
  const MixPart& first = parts.front();
  for (const MixPart& part : parts) {
    const std::string &mine = first.config.base_fingerprint, &other = part.config.base_fingerprint;
    const bool known = !mine.empty() && !other.empty();
    const std::string &name = first.config.base_model_name_or_path, &its = part.config.base_model_name_or_path;
    MOESAIC_CHECK(!known || formats::may_be_same_weights(mine, other), UsageError,
                  "got adapters of different bases, expected one: that of {} is {} ({}), that of {} is {} ({})",
                  first.where, name, mine.substr(0, 19), part.where, its, other.substr(0, 19));
    if (known || name == its) continue;
    spdlog::warn(
        "{} was trained on {}, {} on {}: whether these are one model their folders do not say. If they are not, the "
        "mix is of no use.",
        first.where, name.empty() ? "a base it doesn't name" : name, part.where,
        its.empty() ? "a base it doesn't name" : its);
  }
}

/// Where the parts' targets are the same, these; else every site by its path.
void take_targets(const std::vector<MixPart>& parts, const std::set<std::string>& sites, AdapterConfig& config) {
  const AdapterConfig& first = parts.front().config;
  const bool same = std::all_of(parts.begin(), parts.end(), [&](const MixPart& part) {
    const AdapterConfig& each = part.config;
    return each.targets == first.targets && each.exclude == first.exclude && each.spelling == first.spelling &&
           each.layers_to_transform == first.layers_to_transform;
  });
  config.spelling = first.spelling;
  if (same) {
    config.targets = first.targets;
    config.exclude = first.exclude;
    config.layers_to_transform = first.layers_to_transform;
    return;
  }
  std::vector<std::string> paths;
  for (const std::string& site : sites) paths.push_back(formats::spelled(config.spelling, site));
  config.targets = paths;
}

/// The largest rank at linears of each name; the most frequent one is the config's, the others are patterns.
void settle_ranks(const std::vector<MixPart>& parts, AdapterConfig& config) {
  std::map<std::string, int64_t> ranks;  // by the last part of the path
  for (const MixPart& part : parts) {
    for (const std::string& site : part.sites) {
      int64_t& rank = ranks[last_name(site)];
      rank = std::max(rank, part.config.rank_at(site));
    }
  }
  std::map<int64_t, int64_t> names;
  for (const auto& [name, rank] : ranks) ++names[rank];
  config.lora_rank = std::max_element(names.begin(), names.end(), [](const auto& a, const auto& b) {
                       return a.second < b.second;
                     })->first;
  config.lora_alpha = static_cast<double>(config.lora_rank);
  for (const auto& [name, rank] : ranks) {
    if (rank == config.lora_rank) continue;
    config.rank_pattern.add(name, rank);
    config.alpha_pattern.add(name, static_cast<double>(rank));
  }
}

/// The parts' pairs at one site, stacked: A [E, rank, in] and B [E, out, rank], zero where there is nothing.
std::pair<torch::Tensor, torch::Tensor> stack_pairs(const std::vector<MixPart>& parts, const std::string& site,
                                                    int64_t rank) {
  const auto experts = static_cast<int64_t>(parts.size());
  torch::Tensor a, b;
  const MixPart* first = nullptr;
  for (int64_t e = 0; e < experts; ++e) {
    const MixPart& part = parts[e];
    if (!part.sites.contains(site)) continue;
    const torch::Tensor own_a = part.tensors.at(site + kA), own_b = part.tensors.at(site + kB);
    const int64_t in = own_a.size(1), out = own_b.size(0);
    if (first == nullptr) {
      first = &part;
      a = torch::zeros({experts, rank, in});
      b = torch::zeros({experts, out, rank});
    }
    MOESAIC_CHECK(in == a.size(2) && out == b.size(1), DataError,
                  "{}: got a linear of {} inputs and {} outputs in {}, expected {} and {} as in {}: adapters of "
                  "different bases",
                  site, in, out, part.where, a.size(2), b.size(1), first->where);
    a[e].narrow(0, 0, own_a.size(0)).copy_(own_a);
    b[e].narrow(1, 0, own_b.size(1)).copy_(own_b.to(torch::kFloat32) * part.config.scale_at(site));
  }
  return {a, b};
}

/// Row(A_e, B_e) [in] of every expert and site.
template <class Row>
formats::TensorMap routers_of(const formats::AdapterFolder& mix, Row row) {
  formats::TensorMap routers;
  for (const auto& [name, a] : mix.tensors) {
    if (!name.ends_with(kA)) continue;
    const std::string site = module_of(name);
    const torch::Tensor b = mix.tensors.at(site + kB);
    std::vector<torch::Tensor> rows;
    for (int64_t e = 0; e < a.size(0); ++e) rows.push_back(row(a[e], b[e]));
    routers[site + kRouter] = torch::stack(rows).to(torch::kFloat32);
  }
  return routers;
}

/// The first right singular vector of B A: [in], float64; zeros when B A is zero.
torch::Tensor arrow(const torch::Tensor& a, const torch::Tensor& b) {
  const auto [q, r_a] = at::linalg_qr(a.to(torch::kFloat64).t());
  const torch::Tensor r_b = std::get<1>(at::linalg_qr(b.to(torch::kFloat64)));
  const auto [u, singular, v] = at::linalg_svd(at::mm(r_b, r_a.t()), /*full_matrices=*/false);
  if (singular[0].item<double>() == 0) return torch::zeros({a.size(1)}, torch::kFloat64);
  return at::mv(q, v[0]);
}

}  // namespace

MixPart read_mix_part(const std::filesystem::path& dir) {
  const std::string where = dir.string();
  const formats::AdapterFolder folder = formats::read_adapter_folder(dir);
  MixPart part{where, parse_adapter_config(folder, (dir / "adapter_config.json").string()), {}, {}};
  const Method& method = method_of(part.config.method);
  MOESAIC_CHECK(
      part.config.method == "lora", UsageError,
      "{}: got an adapter of type {}, expected LORA: the experts of a mix are low-rank pairs{}", where,
      method.peft_type,
      method.mixes && method.low_rank ? "\nhint: `moesaic export --format peft` writes its experts one by one" : "");
  const std::vector<std::string> whole = acting_whole(part.config, folder.tensors);
  MOESAIC_CHECK(whole.empty(), UsageError,
                "{}: got an adapter with {}, expected low-rank pairs of linears alone: what acts through a weight of "
                "the model as a whole is no expert among others",
                where, fmt::join(whole, ", "));
  formats::Misfits found;
  for (const auto& [name, tensor] : folder.tensors) {
    const std::string site = module_of(name);
    if (!name.ends_with(kA) && !name.ends_with(kB)) {
      found.unexpected.push_back(name);
      continue;
    }
    const std::string partner = site + (name.ends_with(kA) ? kB : kA);
    if (!folder.tensors.contains(partner)) found.missing.push_back(partner);
    const int64_t rank = part.config.rank_at(site), dim = name.ends_with(kA) ? 0 : 1;
    if (tensor.dim() != 2 || tensor.size(dim) != rank) {
      found.wrong.push_back(fmt::format("{}: got {}, expected {}", name, shape_text(tensor.sizes()),
                                        dim == 0 ? fmt::format("[{}, in]", rank) : fmt::format("[out, {}]", rank)));
    }
    part.sites.insert(site);
  }
  if (folder.tensors.empty()) found.missing.emplace_back("every low-rank pair");
  formats::check_fits(found, where, "its adapter_config.json", "saved whole?");
  part.tensors = folder.tensors;
  return part;
}

formats::AdapterFolder mix(const std::vector<MixPart>& parts, const RouterConfig& router) {
  MOESAIC_CHECK(parts.size() > 1, UsageError,
                "mix: got {} adapter{}, expected two or more: one alone is used as it is, with --adapter", parts.size(),
                parts.size() == 1 ? "" : "s");
  check_bases(parts);
  torch::NoGradGuard no_grad;
  const auto known = std::find_if(parts.begin(), parts.end(),
                                  [](const MixPart& part) { return !part.config.base_fingerprint.empty(); });
  const MixPart& named = known == parts.end() ? parts.front() : *known;
  AdapterConfig config;
  config.method = "molora";
  config.num_experts = static_cast<int64_t>(parts.size());
  config.router = router;
  config.base_model_name_or_path = named.config.base_model_name_or_path;
  config.base_fingerprint = named.config.base_fingerprint;
  config.base_dtype = named.config.base_dtype;
  const Json& extra = parts.front().config.extra;
  if (extra.contains("task_type")) config.extra["task_type"] = extra["task_type"];
  std::set<std::string> sites;
  for (const MixPart& part : parts) sites.insert(part.sites.begin(), part.sites.end());
  take_targets(parts, sites, config);
  settle_ranks(parts, config);
  validate(config, "mix");
  formats::AdapterFolder folder{adapter_config_json(config), {}, config.spelling};
  for (const std::string& site : sites) {
    const auto [a, b] = stack_pairs(parts, site, config.rank_at(site));
    folder.tensors[site + kA] = a;
    folder.tensors[site + kB] = b;
  }
  return folder;
}

std::string describe(const MixPart& part, const formats::AdapterFolder& mix) {
  const auto all =
      std::count_if(mix.tensors.begin(), mix.tensors.end(), [](const auto& item) { return item.first.ends_with(kA); });
  std::set<int64_t> ranks;
  std::set<double> scales;
  for (const std::string& site : part.sites) {
    ranks.insert(part.config.rank_at(site));
    scales.insert(part.config.scale_at(site));
  }
  return fmt::format("{}: {} of {} sites{}, rank {}, scale {:.4g}", part.where, part.sites.size(), all,
                     std::ssize(part.sites) < all ? " (nothing at the others)" : "", fmt::join(ranks, ", "),
                     fmt::join(scales, ", "));
}

formats::TensorMap even_routers(const formats::AdapterFolder& mix) {
  return routers_of(mix, [](const torch::Tensor& a, const torch::Tensor&) { return torch::zeros({a.size(1)}); });
}

formats::TensorMap arrow_routers(const formats::AdapterFolder& mix) {
  torch::NoGradGuard no_grad;
  return routers_of(mix, arrow);
}

Routers::Routers(std::shared_ptr<Adapter> adapter) : adapter_(std::move(adapter)) {
  for (const nn::Parameter& parameter : adapter_->parameters()) {
    torch::Tensor(parameter.tensor).set_requires_grad(parameter.kind == nn::Parameter::Kind::kRouter);
  }
  MOESAIC_CHECK(!parameters().empty(), UsageError, "got an adapter without a router, expected several experts");
}

std::vector<nn::Parameter> Routers::parameters() {
  std::vector<nn::Parameter> routers = adapter_->parameters();
  std::erase_if(routers, [](const nn::Parameter& each) { return each.kind != nn::Parameter::Kind::kRouter; });
  return routers;
}

}  // namespace moesaic::adapters
