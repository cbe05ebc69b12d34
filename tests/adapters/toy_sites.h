// Two layers of sites without a model: d = 12, H = 3, H_kv = 1, k = 4, f = 20.
#pragma once
#include <deque>

#include "moesaic/nn/linear.h"

namespace moesaic::adapters {

struct ToySites {
  explicit ToySites(bool qk_norm = false) {
    const auto options = torch::TensorOptions().dtype(torch::kFloat32);
    sites.has_qk_norm = qk_norm;
    sites.model_type = "llama";
    auto group = [&](int64_t layer, const std::string& prefix, int64_t in,
                     const std::vector<std::pair<std::string, int64_t>>& members) {
      std::vector<int64_t> outs;
      for (const auto& member : members) outs.push_back(member.second);
      nn::LinearGroup& made = groups.emplace_back(in, outs, false, options);
      torch::NoGradGuard no_grad;
      for (size_t i = 0; i < members.size(); ++i) {
        made.members()[i]->weight.normal_(0, 0.3);
        sites.linears.push_back(
            {prefix + members[i].first, layer, &made, static_cast<int64_t>(i), in, members[i].second});
      }
    };
    auto scale = [&](int64_t layer, const std::string& name, nn::ScaleKind kind, int64_t heads, int64_t width) {
      sites.scales.push_back({name, layer, kind, &slots.emplace_back(), heads, width, 12});
    };
    for (int64_t layer = 0; layer < 2; ++layer) {
      const std::string base = fmt::format("model.layers.{}.", layer);
      group(layer, base + "self_attn.", 12, {{"q_proj", 12}, {"k_proj", 4}, {"v_proj", 4}});
      group(layer, base + "self_attn.", 12, {{"o_proj", 12}});
      group(layer, base + "mlp.", 12, {{"gate_proj", 20}, {"up_proj", 20}});
      group(layer, base + "mlp.", 20, {{"down_proj", 12}});
      scale(layer, base + "self_attn.q_proj", nn::ScaleKind::kOutput, 3, 4);
      scale(layer, base + "self_attn.k_proj", nn::ScaleKind::kOutput, 1, 4);
      scale(layer, base + "self_attn.v_proj", nn::ScaleKind::kOutput, 1, 4);
      if (qk_norm) scale(layer, base + "self_attn.k_proj", nn::ScaleKind::kPostHeadNorm, 1, 4);
      scale(layer, base + "mlp.down_proj", nn::ScaleKind::kFfn, 0, 20);
    }
  }

  std::deque<nn::LinearGroup> groups;  // references stay valid
  std::deque<nn::ScaleSlot> slots;
  nn::Sites sites;
};

}  // namespace moesaic::adapters
