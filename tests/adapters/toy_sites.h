// Two layers of sites without a model: d = 12, H = 3, H_kv = 1, k = 4, f = 20.
#pragma once
#include <deque>

#include "moesaic/nn/linear.h"

namespace moesaic::adapters {

struct ToySites {
  explicit ToySites(bool qk_norm = false) {
    using enum nn::Role;
    sites.has_qk_norm = qk_norm;
    sites.model_type = "llama";
    for (int64_t layer = 0; layer < 2; ++layer) {
      const std::string base = fmt::format("model.layers.{}.", layer);
      add(layer, base + "self_attn.", 12,
          {{"q_proj", kQuery, 12, 3}, {"k_proj", kKey, 4, 1}, {"v_proj", kValue, 4, 1}});
      if (qk_norm) scale(layer, base + "self_attn.k_proj", kKey, nn::ScaleKind::kPostHeadNorm, 1, 4);
      add(layer, base + "self_attn.", 12, {{"o_proj", kAttentionOut, 12, 0}});
      add(layer, base + "mlp.", 12, {{"gate_proj", kGate, 20, 0}, {"up_proj", kUp, 20, 0}});
      add(layer, base + "mlp.", 20, {{"down_proj", kDown, 12, 0}});
      scale(layer, base + "mlp.down_proj", kDown, nn::ScaleKind::kFfn, 0, 20);
    }
  }

  std::deque<nn::LinearGroup> groups;  // references stay valid
  std::deque<nn::ScaleSlot> slots;     // those of no group
  nn::Sites sites;

 private:
  struct Member {
    const char* name;
    nn::Role role;
    int64_t out, heads;
  };

  void add(int64_t layer, const std::string& prefix, int64_t in, const std::vector<Member>& members) {
    std::vector<int64_t> outs, heads;
    for (const Member& member : members) {
      outs.push_back(member.out);
      heads.push_back(member.heads);
    }
    nn::LinearGroup& group = groups.emplace_back(in, outs, false, torch::TensorOptions(torch::kFloat32), heads);
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < members.size(); ++i) {
      const auto& [name, role, out, head_count] = members[i];
      const auto index = static_cast<int64_t>(i);
      group.members()[i]->weight.normal_(0, 0.3);
      sites.linears.push_back({prefix + name, role, layer, &group, index, in, out});
      sites.scales.push_back({prefix + name, role, layer, nn::ScaleKind::kInput, &group.input_slot(index), 0, in, 12});
      sites.scales.push_back({prefix + name, role, layer, nn::ScaleKind::kOutput, &group.output_slot(index), head_count,
                              head_count > 0 ? out / head_count : out, 12});
    }
  }

  void scale(int64_t layer, const std::string& name, nn::Role role, nn::ScaleKind kind, int64_t heads, int64_t width) {
    sites.scales.push_back({name, role, layer, kind, &slots.emplace_back(), heads, width, 12});
  }
};

}  // namespace moesaic::adapters
