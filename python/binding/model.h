// A model as Python holds it: tensors, numbers, strings and JSON texts go in and out.
#pragma once
#include <torch/custom_class.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "moesaic/adapters/adapter.h"
#include "moesaic/run/evaluation.h"
#include "python/binding/job.h"

namespace moesaic::python {

class Model : public torch::CustomClassHolder {
 public:
  /// `named`: a model, a composition or an adapter's folder. Throws what run::open throws.
  Model(const std::string& named, const std::string& device, const std::string& dtype, bool int8);

  /// {"model", "model_type", "vocab_size", "width", "blocks", "parameters", "device", "dtype", "eos_ids", "adapters",
  ///  "structure", "chat_template", "prompts_apart", "sites": [[path, out, in]]}.
  std::string facts();
  /// The adapter `name`: new, trainable, of a run's keys; or frozen, of a folder.
  void attach_new(const std::string& name, const std::string& keys, int64_t seed);
  void attach_folder(const std::string& name, const std::string& folder, double scale);
  void detach(const std::string& name);
  void set_trainable(const std::string& name, bool on);
  void save(const std::string& name, const std::string& folder);
  /// Trained tensors of the adapter `name`, live.
  std::vector<std::tuple<std::string, torch::Tensor>> parameters(const std::string& name);
  std::vector<torch::Tensor> base_parameters();

  /// start: of a text that goes on.
  std::vector<int64_t> text_ids(const std::string& text, bool start);
  /// Of a text behind another.
  std::vector<int64_t> answer_ids(const std::string& text);
  /// A conversation and its tools, JSON lists, with the head of an answer.
  std::vector<int64_t> chat_ids(const std::string& messages, const std::string& tools);
  std::string decode(const std::vector<int64_t>& ids, bool skip_special_tokens);

  /// ids [N] int64, offsets [B+1] int64; borders: a list of tokens' numbers for each sequence, or none. Returns logits
  /// [N, V] with their graph, and with `losses` the routers' mean balance and z-loss (else empty). `adapters`: weights
  /// by name, JSON; "" = all 1.
  std::vector<torch::Tensor> forward(const torch::Tensor& ids, const torch::Tensor& offsets,
                                     const std::vector<std::vector<int64_t>>& borders, const std::string& adapters,
                                     bool training, bool losses);
  /// log p of every token of `answers` behind its prompt; without answers of the prompts' own behind their first.
  std::vector<std::vector<double>> score(const std::vector<std::vector<int64_t>>& prompts,
                                         const std::vector<std::vector<int64_t>>& answers);

  // Each may be stopped. Of JSON texts, keys that are missing have their defaults; python/moesaic/model.py names them.
  c10::intrusive_ptr<Job> generate(const std::vector<std::vector<int64_t>>& prompts, const std::string& options);
  c10::intrusive_ptr<Job> evaluate(const std::string& options);
  c10::intrusive_ptr<Job> routes(const std::string& options);

 private:
  std::shared_ptr<void> use();
  adapters::Adapter& adapter(const std::string& name);
  const tokenizer::Tokenizer& tokenizer() const;
  c10::intrusive_ptr<Job> start(Job::Work work);
  void adapt_tokenizer();

  run::ModelReference from_;
  run::Opened opened_;
  const std::shared_ptr<const tokenizer::Tokenizer> own_tokenizer_;  // without what adapters bring
  std::map<std::string, std::shared_ptr<adapters::Adapter>> adapters_;
  std::mutex mutex_;  // what there is of adapters; facts are asked while the model is at work
  std::atomic<bool> in_use_ = false;
};

}  // namespace moesaic::python
