#include "moesaic/formats/gguf_checkpoint.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <mutex>
#include <numbers>

#include "moesaic/base/file_memory.h"
#include "moesaic/formats/config.h"
#include "moesaic/formats/expert_names.h"
#include "moesaic/formats/gguf.h"
#include "moesaic/formats/gguf_tokenizer.h"

namespace moesaic::formats {
namespace {

constexpr uint64_t kMaxSize = 1 << 30;  // of any count in the metadata
constexpr size_t kMaxListedErrors = 10;
constexpr const char* kRopeFactors = "rope_freqs.weight";

constexpr GgufName kTopNames[] = {
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
};
constexpr GgufName kLayerNames[] = {
    {"attn_norm", "input_layernorm"},
    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},
    {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"},
    {"attn_q_norm", "self_attn.q_norm"},
    {"attn_k_norm", "self_attn.k_norm"},
    {"ffn_gate", "mlp.gate_proj"},
    {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"},
    // Experts: stacks of all, and the one that every token has; `unstacked` takes it from there.
    {"ffn_gate_inp", "mlp.gate"},
    {"ffn_gate_exps", "mlp.experts.gate_proj"},
    {"ffn_up_exps", "mlp.experts.up_proj"},
    {"ffn_gate_up_exps", "mlp.experts.gate_up_proj"},
    {"ffn_down_exps", "mlp.experts.down_proj"},
    {"ffn_gate_inp_shexp", "mlp.shared_expert_gate"},
    {"ffn_gate_shexp", "mlp.shared_expert.gate_proj"},
    {"ffn_up_shexp", "mlp.shared_expert.up_proj"},
    {"ffn_down_shexp", "mlp.shared_expert.down_proj"},
};
/// Before there were stacks: "blk.0.ffn_gate.3.weight".
constexpr GgufName kSingleExperts[] = {{"ffn_gate.", "gate_proj"}, {"ffn_up.", "up_proj"}, {"ffn_down.", "down_proj"}};

/// The Hugging Face name of a tensor, or "" when it is unknown.
std::string hf_name(const std::string& name, std::span<const GgufName> norms) {
  for (const auto& [gguf, hf] : kTopNames) {
    if (name == gguf) return hf;
  }
  if (!name.starts_with("blk.")) return "";
  const size_t layer_end = name.find('.', 4), part_end = name.rfind('.');
  if (layer_end == std::string::npos || part_end <= layer_end) return "";
  const std::string layer = name.substr(4, layer_end - 4), suffix = name.substr(part_end);
  const std::string part = name.substr(layer_end + 1, part_end - layer_end - 1);
  const bool number = !layer.empty() && layer.size() < 6 && layer.find_first_not_of("0123456789") == std::string::npos;
  if (!number || (suffix != ".weight" && suffix != ".bias")) return "";
  for (const auto& pairs : {std::span<const GgufName>(kLayerNames), norms}) {
    for (const auto& [gguf, hf] : pairs) {
      if (part == gguf) return fmt::format("model.layers.{}.{}{}", layer, hf, suffix);
    }
  }
  for (const auto& [gguf, hf] : kSingleExperts) {
    if (part.starts_with(gguf)) {
      return fmt::format("model.layers.{}.mlp.experts.{}.{}{}", layer, part.substr(std::strlen(gguf)), hf, suffix);
    }
  }
  return "";
}

/// float32 for a quantised type.
at::ScalarType plain_dtype(GgmlType type) {
  switch (type) {
    case GgmlType::kF16: return at::kHalf;
    case GgmlType::kBF16: return at::kBFloat16;
    default: return at::kFloat;
  }
}

/// What llama3's rope scaling divides each frequency by (transformers: modeling_rope_utils, "llama3").
std::vector<double> llama3_factors(size_t count, double theta, double factor, double low, double high,
                                   double original) {
  std::vector<double> factors(count);
  for (size_t i = 0; i < count; ++i) {
    const double wavelength =
        2 * std::numbers::pi * std::pow(theta, static_cast<double>(i) / static_cast<double>(count));
    const double smooth = std::clamp((original / wavelength - low) / (high - low), 0.0, 1.0);
    factors[i] = 1 / ((1 - smooth) / factor + smooth);
  }
  return factors;
}

class GgufCheckpoint : public Checkpoint {
 public:
  GgufCheckpoint(Bytes bytes, std::span<const GgufArchitecture* const> known) : file_(std::move(bytes)) {
    path_ = file_.bytes().where;
    const std::string& where = file_.bytes().where;
    const std::string type = file_.find_string("general.type").value_or("model");
    MOESAIC_CHECK(type == "model", DataError, "{}: general.type: got '{}', expected 'model'", where, type);
    const GgufMetadata metadata(file_);
    std::vector<std::string> names;
    for (const GgufArchitecture* architecture : known) {
      names.push_back(architecture->name);
      if (metadata.arch() == architecture->name) architecture_ = architecture;
    }
    MOESAIC_CHECK(architecture_, DataError, "{}: general.architecture: got '{}', expected one of {}", where,
                  metadata.arch(), fmt::join(names, ", "));
    map_tensors();
    config_ = normalise_config(translate(metadata), where);
    unstack_experts();
    check_head_rows();
  }

  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const auto& [name, _] : tensors_) names.push_back(name);
    return names;
  }
  bool contains(const std::string& name) const override { return tensors_.contains(name); }
  std::vector<int64_t> shape(const std::string& name) const override {
    const Part& part = at(name);
    return part.count < 0 ? part.tensor->shape : std::vector{part.count, part.tensor->shape.back()};
  }

  at::ScalarType dtype(const std::string& name) const override {
    return offset_norm(name) ? at::kFloat : plain_dtype(at(name).tensor->type);
  }

  std::string stored_type(const std::string& name) const override {
    const GgmlTypeInfo& info = ggml_type_info(at(name).tensor->type);
    return info.elements == 1 ? dtype_name(plain_dtype(info.type)) : info.name;
  }

  at::Tensor tensor(const std::string& name) const override {
    const at::ScalarType dtype = this->dtype(name);
    const bool plain = ggml_type_info(at(name).tensor->type).elements == 1;
    const std::string_view bytes = bytes_of(at(name));
    const bool aligned = reinterpret_cast<uintptr_t>(bytes.data()) % c10::elementSize(dtype) == 0;
    if (plain && aligned && heads_of(name) == 0 && !offset_norm(name)) {
      return at::from_blob(
          const_cast<char*>(bytes.data()), shape(name), [owner = file_.bytes().owner](void*) {},
          at::TensorOptions().dtype(dtype));
    }
    at::Tensor loaded = at::empty(shape(name), dtype);
    read_into(name, loaded);
    return loaded;
  }

  void read_into(const std::string& name, at::Tensor destination) const override {
    const std::vector<int64_t> shape = this->shape(name);
    MOESAIC_CHECK(destination.sizes() == at::IntArrayRef(shape), ShapeError,
                  "{}: tensor '{}': got shape {}, expected {}", path_.string(), name, fmt::join(shape, "x"),
                  fmt::join(destination.sizes(), "x"));
    const int64_t rows = rows_of(at(name));
    const at::NoGradGuard no_grad;
    if (destination.is_cpu() && destination.scalar_type() == at::kFloat && destination.is_contiguous()) {
      read_float(name, 0, rows, destination.data_ptr<float>());
    } else {
      // In other formats by parts: the whole in float32 beside it would be most of what a load takes.
      constexpr int64_t kPart = int64_t{1} << 20;  // elements
      const int64_t columns = shape.back();
      const int64_t most = std::max<int64_t>(1, kPart / columns);
      at::Tensor part = at::empty({std::min(most, rows), columns}, at::kFloat);
      for (int64_t begin = 0; begin < rows; begin += most) {
        const int64_t count = std::min(most, rows - begin);
        read_float(name, begin, begin + count, part.data_ptr<float>());
        const at::Tensor values = part.narrow(0, 0, count);
        destination.dim() == 1 ? destination.copy_(values[0]) : destination.narrow(0, begin, count).copy_(values);
      }
    }
    file_.bytes().release(bytes_of(at(name)));
  }

  std::optional<std::string> tokenizer_json() const override { return gguf_tokenizer_json(file_); }
  Json tokenizer_config() const override { return gguf_tokenizer_config(file_); }
  ChatTemplates chat_templates() const override { return gguf_chat_templates(file_); }

  Json generation_config() const override {
    Json config = Json::object();
    Json eos = Json::array();
    for (const char* key : {"eos_token_id", "eot_token_id", "eom_token_id"}) {
      const auto id = file_.find_uint(std::string("tokenizer.ggml.") + key);
      if (id && std::find(eos.begin(), eos.end(), Json(*id)) == eos.end()) eos.push_back(*id);
    }
    if (eos.size() == 1) config["eos_token_id"] = Json(eos[0]);
    if (eos.size() > 1) config["eos_token_id"] = eos;
    if (const auto id = file_.find_uint("tokenizer.ggml.bos_token_id")) config["bos_token_id"] = *id;
    if (const auto id = file_.find_uint("tokenizer.ggml.padding_token_id")) config["pad_token_id"] = *id;
    return config;
  }

  std::string fingerprint() const override {
    std::call_once(fingerprint_once_, [this] {
      fingerprint_ = remembered("fingerprint of every byte", {path_}, [this] {
        auto all = fingerprint_of(names(), [this](const std::string& name) {
          return StoredTensor{ggml_type_info(at(name).tensor->type).name, shape(name), bytes_of(at(name))};
        });
        for (const std::string& name : names()) file_.bytes().release(bytes_of(at(name)));
        return all;
      });
    });
    return fingerprint_;
  }

 private:
  /// A tensor, or rows of one; see StoredRows.
  struct Part {
    const GgufTensor* tensor;
    int64_t begin = 0, count = -1;
  };
  const Part& at(const std::string& name) const {
    const auto it = tensors_.find(name);
    MOESAIC_CHECK(it != tensors_.end(), DataError, "{}: has no tensor '{}'", path_.string(), name);
    return it->second;
  }
  /// Rows of a tensor whose leading axes are taken as one; a vector is one row.
  static int64_t rows_of(const GgufTensor& tensor) {
    return std::accumulate(tensor.shape.begin(), tensor.shape.end() - 1, int64_t{1}, std::multiplies());
  }
  static int64_t rows_of(const Part& part) { return part.count < 0 ? rows_of(*part.tensor) : part.count; }
  static std::string_view bytes_of(const Part& part) {
    const std::string_view all = part.tensor->bytes;
    if (part.count < 0) return all;
    const size_t row = all.size() / static_cast<size_t>(rows_of(*part.tensor));
    return all.substr(part.begin * row, part.count * row);
  }

  /// llama.cpp's converter stores gemma's norm weights as 1 + w.
  bool offset_norm(const std::string& name) const {
    return architecture_->norms_plus_one && name.ends_with("norm.weight");
  }

  /// Heads whose rows llama.cpp's converter interleaved; 0 for a tensor it left alone.
  int64_t heads_of(const std::string& name) const {
    if (!architecture_->interleaved_heads) return 0;
    if (name.find(".self_attn.q_proj.") != std::string::npos) return heads_;
    return name.find(".self_attn.k_proj.") != std::string::npos ? kv_heads_ : 0;
  }

  /// Dequantises the rows first .. last-1 of a tensor into `out`, in the order of the Hugging Face model: row 2 i + s
  /// of a stored llama head (i < k/2, s < 2) is row s k/2 + i of the model's.
  void read_float(const std::string& name, int64_t first, int64_t last, float* out) const {
    const GgufTensor& stored = *at(name).tensor;
    const std::string_view bytes = bytes_of(at(name));
    const bool vector = stored.shape.size() == 1;
    const int64_t heads = heads_of(name), columns = stored.shape.back();
    const int64_t row_bytes = static_cast<int64_t>(bytes.size()) / rows_of(at(name));
    const auto* blocks = reinterpret_cast<const uint8_t*>(bytes.data());
    const auto stored_row = [half = heads > 0 ? stored.shape[0] / heads / 2 : 0](int64_t row) {
      const int64_t head = row / (2 * half), within = row % (2 * half);
      return head * 2 * half + within % half * 2 + within / half;
    };
    if (vector && heads > 0) {
      std::vector<float> values(columns);
      dequantize(stored.type, blocks, columns, values.data());
      for (int64_t i = 0; i < columns; ++i) out[i] = values[stored_row(i)];
    } else {
      constexpr int64_t kGrain = 1 << 16;  // elements
      at::parallel_for(first, last, std::max<int64_t>(1, kGrain / columns), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t from = heads > 0 ? stored_row(row) : row;
          dequantize(stored.type, blocks + from * row_bytes, columns, out + (row - first) * columns);
        }
      });
    }
    if (offset_norm(name)) {
      std::transform(out, out + (last - first) * columns, out, [](float value) { return value - 1.0f; });
    }
  }

  void map_tensors() {
    std::vector<std::string> errors;
    for (const auto& tensor : file_.tensors()) {
      if (tensor.name == kRopeFactors) continue;
      const std::string name = hf_name(tensor.name, architecture_->norms);
      if (name.empty()) {
        errors.push_back(tensor.name);
      } else {
        tensors_.emplace(name, Part{&tensor});
      }
    }
    const size_t shown = std::min(errors.size(), kMaxListedErrors);
    MOESAIC_CHECK(errors.empty(), DataError, "{}: {} tensors have unknown names: {}{}", path_.string(), errors.size(),
                  fmt::join(errors.begin(), errors.begin() + shown, ", "), errors.size() > shown ? ", ..." : "");
  }

  void unstack_experts() {
    const auto names = expert_names(config_.value("model_type", ""));
    if (!names) return;
    std::map<std::string, std::vector<int64_t>> shapes;
    for (const auto& [name, part] : tensors_) shapes[name] = part.tensor->shape;
    std::map<std::string, Part> apart;
    for (const auto& [name, rows] : unstacked(*names, shapes, path_.string())) {
      apart[name] = {tensors_.at(rows.stored).tensor, rows.begin, rows.count};
    }
    tensors_ = std::move(apart);
  }

  void check_head_rows() const {
    for (const auto& [name, part] : tensors_) {
      const int64_t heads = heads_of(name), rows = part.tensor->shape[0];
      MOESAIC_CHECK(heads == 0 || rows % (2 * heads) == 0, FormatError,
                    "{}: tensor '{}' has {} rows, expected a multiple of 2 x {} heads", path_.string(), name, rows,
                    heads);
    }
  }

  /// config.json's keys from the metadata.
  Json translate(const GgufMetadata& metadata) {
    const std::string& where = file_.bytes().where;
    Json config = Json::object();
    std::vector<std::string> missing;
    const auto require = [&](const char* key, const char* name, const auto& value) {
      if (value)
        config[key] = *value;
      else
        missing.push_back(metadata.key(name));
    };
    for (const auto& [key, name] : {std::pair{"hidden_size", "embedding_length"},
                                    {"intermediate_size", "feed_forward_length"},
                                    {"num_hidden_layers", "block_count"},
                                    {"num_attention_heads", "attention.head_count"},
                                    {"max_position_embeddings", "context_length"}}) {
      require(key, name, metadata.find_size(name));
    }
    constexpr const char* kEpsilon = "attention.layer_norm_rms_epsilon";
    require("rms_norm_eps", kEpsilon, metadata.find_number(kEpsilon));
    MOESAIC_CHECK(missing.empty(), FormatError, "{}: metadata is missing: {}", where, fmt::join(missing, ", "));
    heads_ = config["num_attention_heads"];
    kv_heads_ = metadata.find_size("attention.head_count_kv").value_or(heads_);
    const int64_t hidden = config["hidden_size"];
    MOESAIC_CHECK(heads_ > 0 && kv_heads_ > 0 && hidden > 0, FormatError,
                  "{}: metadata: got embedding_length {}, head_count {}, head_count_kv {}, expected all above 0", where,
                  hidden, heads_, kv_heads_);
    const int64_t head_dim = metadata.find_size("attention.key_length")
                                 .value_or(metadata.find_size("rope.dimension_count").value_or(hidden / heads_));
    const int64_t rotated = metadata.find_size("rope.dimension_count").value_or(head_dim);
    MOESAIC_CHECK(rotated == head_dim, DataError,
                  "{}: {} of each head's {} sizes are rotated (rope.dimension_count); expected all", where, rotated,
                  head_dim);
    config["num_key_value_heads"] = kv_heads_;
    config["head_dim"] = head_dim;
    config["tie_word_embeddings"] = !tensors_.contains("lm_head.weight");
    config["dtype"] = "float32";

    const auto embedding = tensors_.find("model.embed_tokens.weight");
    MOESAIC_CHECK(embedding != tensors_.end() && embedding->second.tensor->shape.size() == 2, FormatError,
                  "{}: has no matrix token_embd.weight", where);
    config["vocab_size"] = embedding->second.tensor->shape[0];
    for (const auto& [key, gguf] :
         {std::pair{"bos_token_id", "bos"}, {"eos_token_id", "eos"}, {"pad_token_id", "padding"}}) {
      if (const auto id = file_.find_uint(fmt::format("tokenizer.ggml.{}_token_id", gguf))) config[key] = *id;
    }
    config["rope_theta"] = metadata.find_number("rope.freq_base").value_or(10'000.0);
    config["rope_scaling"] = rope_scaling(metadata, config);
    architecture_->complete(metadata, config);
    return config;
  }

  /// llama.cpp's rules: a factor without a type is linear's; cos and sin are multiplied by attn_factor and, under yarn,
  /// by what the factor (and yarn_log_multiplier) gives.
  Json rope_scaling(const GgufMetadata& metadata, Json& config) const {
    const std::string& where = file_.bytes().where;
    auto number = [&](const char* key, double fallback) { return metadata.find_number(key).value_or(fallback); };
    const auto type = file_.find_string(metadata.key("rope.scaling.type")).value_or("linear");
    MOESAIC_CHECK(type == "none" || type == "linear" || type == "yarn", DataError,
                  "{}: rope.scaling.type: got '{}', expected none, linear or yarn", where, type);
    const bool yarn = type == "yarn";
    double factor = number("rope.scaling.factor", number("rope.scale_linear", 1.0));
    if (factor == 0.0 || type == "none") factor = 1.0;
    const double attention = number("rope.scaling.attn_factor", 1.0) * number("rope.scaling.yarn_attn_factor", 1.0);
    const double mixed = yarn ? 1.0 : 0.0, extrapolated = number("rope.scaling.yarn_ext_factor", mixed);
    MOESAIC_CHECK(extrapolated == mixed || extrapolated < 0, DataError,
                  "{}: rope.scaling.yarn_ext_factor: got {} with type {}, expected {}", where, extrapolated, type,
                  mixed);
    if (!yarn && attention != 1.0) config[kRopeMagnitude] = attention;
    for (const auto& tensor : file_.tensors()) {
      if (tensor.name != kRopeFactors) continue;
      MOESAIC_CHECK(factor == 1.0, DataError, "{}: got both {} and rope.scaling ({} by {}), expected one of them",
                    where, kRopeFactors, type, factor);
      return llama3_scaling(tensor, config["rope_theta"]);
    }
    if (factor == 1.0 && (!yarn || attention == 1.0)) return nullptr;
    Json scaling = {{"rope_type", type}, {"factor", factor}};
    if (!yarn) return scaling;
    for (const auto& [key, gguf] :
         {std::pair{"beta_fast", "rope.scaling.yarn_beta_fast"}, {"beta_slow", "rope.scaling.yarn_beta_slow"}}) {
      if (const auto value = metadata.find_number(gguf)) scaling[key] = *value;
    }
    if (const auto original = metadata.find_size("rope.scaling.original_context_length")) {
      scaling["original_max_position_embeddings"] = *original;
    }
    auto magnitude = [&](double scale) { return factor <= 1.0 ? 1.0 : 0.1 * scale * std::log(factor) + 1.0; };
    const double all = number("rope.scaling.yarn_log_multiplier", 0.0);
    if (attention != 1.0 || all != 0.0) scaling["attention_factor"] = attention * magnitude(1.0) / magnitude(all);
    return scaling;
  }

  /// llama.cpp's converter stores llama3's scaling as one divisor per frequency. Its parameters are found again: Meta's
  /// models all use low 1, high 4 and 8192 original positions; the divisors are then computed and compared.
  Json llama3_scaling(const GgufTensor& tensor, double theta) const {
    MOESAIC_CHECK(tensor.shape.size() == 1 && tensor.type == GgmlType::kF32, FormatError,
                  "{}: {} is not a vector of float32", file_.bytes().where, kRopeFactors);
    std::vector<float> stored(tensor.shape[0]);
    std::memcpy(stored.data(), tensor.bytes.data(), tensor.bytes.size());
    constexpr double kLow = 1, kHigh = 4, kOriginal = 8192;
    const double factor = *std::max_element(stored.begin(), stored.end());
    const auto expected = llama3_factors(stored.size(), theta, factor, kLow, kHigh, kOriginal);
    for (size_t i = 0; i < stored.size(); ++i) {
      MOESAIC_CHECK(std::abs(stored[i] - expected[i]) <= 1e-3 * expected[i], DataError,
                    "{}: {}: divisor {} is {}, but llama3 scaling by {} gives {}; other scalings can't be recovered",
                    file_.bytes().where, kRopeFactors, i, stored[i], factor, expected[i]);
    }
    return {{"rope_type", "llama3"},
            {"factor", factor},
            {"low_freq_factor", kLow},
            {"high_freq_factor", kHigh},
            {"original_max_position_embeddings", static_cast<int64_t>(kOriginal)}};
  }

  GgufFile file_;
  const GgufArchitecture* architecture_ = nullptr;
  int64_t heads_ = 0, kv_heads_ = 0;
  std::map<std::string, Part> tensors_;
  mutable std::once_flag fingerprint_once_;
  mutable std::string fingerprint_;
};

}  // namespace

GgufMetadata::GgufMetadata(const GgufFile& file)
    : file_(file), arch_(file.find_string("general.architecture").value_or("")) {}

std::optional<int64_t> GgufMetadata::find_size(const char* name) const {
  const auto value = file_.find_uint(key(name));
  if (!value) return std::nullopt;
  MOESAIC_CHECK(*value <= kMaxSize, FormatError, "{}: metadata '{}': got {}, expected at most {}", file_.bytes().where,
                key(name), *value, kMaxSize);
  return static_cast<int64_t>(*value);
}

std::optional<double> GgufMetadata::find_number(const char* name) const { return file_.find_number(key(name)); }

bool GgufMetadata::has_tensor(std::string_view name) const {
  const auto& tensors = file_.tensors();
  return std::any_of(tensors.begin(), tensors.end(), [&](const GgufTensor& tensor) { return tensor.name == name; });
}

std::string gguf_name(const std::string& hf, const GgufArchitecture& architecture) {
  for (const auto& [gguf, name] : kTopNames) {
    if (hf == name) return gguf;
  }
  constexpr std::string_view kLayers = "model.layers.";
  const size_t layer_end = hf.find('.', kLayers.size()), part_end = hf.rfind('.');
  if (!hf.starts_with(kLayers) || layer_end == std::string::npos || part_end <= layer_end) return "";
  const std::string part = hf.substr(layer_end + 1, part_end - layer_end - 1);
  for (const auto& pairs : {std::span<const GgufName>(kLayerNames), architecture.norms}) {
    for (const auto& [gguf, name] : pairs) {
      if (part != name) continue;
      return fmt::format("blk.{}.{}{}", hf.substr(kLayers.size(), layer_end - kLayers.size()), gguf,
                         hf.substr(part_end));
    }
  }
  return "";
}

std::shared_ptr<Checkpoint> open_gguf(Bytes bytes, std::span<const GgufArchitecture* const> known) {
  return std::make_shared<GgufCheckpoint>(std::move(bytes), known);
}

}  // namespace moesaic::formats
