#include "moesaic/train/step.h"

#include <numeric>

#include "moesaic/base/check.h"
#include "moesaic/base/seed.h"
#include "moesaic/models/finite.h"
#include "moesaic/moe/router.h"
#include "moesaic/ranks/deal.h"
#include "moesaic/train/checkpointed_blocks.h"

namespace moesaic::train {
namespace {

torch::Tensor sum_of(const torch::Tensor& sum, const torch::Tensor& value) {
  return sum.defined() ? sum + value : value;
}

}  // namespace

std::optional<data::Example> BatchReader::take(const MicroBatch& batch) {
  if (config_.max_batch_tokens == 0) {
    if (static_cast<int64_t>(batch.examples.size()) == config_.per_device_train_batch_size) return std::nullopt;
    return stream_.next();
  }
  if (!ahead_) {
    state_before_ = stream_.state();
    ahead_ = stream_.next();
  }
  if (!ahead_) return std::nullopt;
  const bool fits = batch.tokens + static_cast<int64_t>(ahead_->ids.size()) <= config_.max_batch_tokens;
  if (!fits && !batch.examples.empty()) return std::nullopt;  // an example longer than the limit goes alone
  return std::exchange(ahead_, std::nullopt);
}

std::vector<MicroBatch> BatchReader::next_step() {
  std::vector<MicroBatch> batches;
  for (int64_t i = 0; i < config_.micro_batches(); ++i) {
    MicroBatch batch;
    while (auto example = take(batch)) {
      batch.tokens += static_cast<int64_t>(example->ids.size());
      batch.examples.push_back(std::move(*example));
    }
    if (batch.examples.empty()) break;
    batches.push_back(std::move(batch));
  }
  return batches.size() > 1 && config_.max_batch_tokens == 0 ? dealt(std::move(batches)) : batches;
}

std::vector<MicroBatch> BatchReader::dealt(std::vector<MicroBatch> read) const {
  std::vector<data::Example> examples;
  for (MicroBatch& batch : read) std::move(batch.examples.begin(), batch.examples.end(), std::back_inserter(examples));
  std::vector<size_t> order(examples.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return examples[a].ids.size() > examples[b].ids.size(); });
  std::vector<std::vector<size_t>> dealt(read.size());
  std::vector<int64_t> tokens(read.size(), 0);
  for (const size_t i : order) {
    const auto lightest = std::min_element(tokens.begin(), tokens.end()) - tokens.begin();
    dealt[lightest].push_back(i);
    tokens[lightest] += static_cast<int64_t>(examples[i].ids.size());
  }
  std::vector<MicroBatch> batches;
  for (size_t k = 0; k < dealt.size(); ++k) {
    std::sort(dealt[k].begin(), dealt[k].end());  // as they were read
    MicroBatch& batch = batches.emplace_back(MicroBatch{{}, tokens[k]});
    for (const size_t i : dealt[k]) batch.examples.push_back(std::move(examples[i]));
  }
  return batches;
}

models::Text text_of(const data::Batch& batch, const std::vector<data::Example>& examples) {
  models::Text text{batch.tokens, batch.prompt_ends};
  text.sentence = batch.sentence;
  text.rows = batch.label_rows;
  for (const data::Example& example : examples) {
    const int64_t end = example.prompt_ends.empty() ? 1 : example.prompt_ends.front();
    text.prompts.emplace_back(example.ids.begin(), example.ids.begin() + end);
  }
  return text;
}

Stepper::Stepper(models::LanguageModel& model, nn::Learner& learner, const TrainConfig& config,
                 std::shared_ptr<ranks::Group> group)
    : model_(model),
      config_(config),
      group_(std::move(group)),
      tensors_(optimized_tensors(learner, config)),
      sum_(group_),
      generator_(make_generator(config.seed, model.facts().device)) {
  if (config.optim == "adamw") {
    optimizer_ = make_adamw(tensors_, {config.adam_beta1, config.adam_beta2, config.adam_epsilon});
  } else {
    optimizer_ = make_adafactor(tensors_, {.initial_step = config.adafactor_initial_step});
  }
}

StepResult Stepper::run(const std::vector<MicroBatch>& batches, int64_t step, double factor,
                        moe::RoutingStats* routing) {
  StepResult result;
  int64_t targets = 0, sequences = 0;
  for (const auto& batch : batches) {
    result.tokens += batch.tokens;
    result.examples += std::ssize(batch.examples);
    for (const auto& example : batch.examples) {
      targets += example.targets();
      sequences += example.targets() > 0;
    }
  }
  MOESAIC_CHECK(targets > 0, DataError, "step {}: none of its examples has a token to train on", step);

  // What is summed: the gradients, the answers' loss, the routers'.
  std::vector<torch::Tensor> like;
  for (const auto& t : tensors_) like.push_back(t.tensor);
  like.insert(like.end(), 2, torch::empty({}, torch::dtype(torch::kFloat32).device(model_.facts().device)));
  std::vector<Json> routed;
  sum_.begin(std::ssize(batches));
  const auto [first, last] = sum_.own();
  for (int64_t k = first; k < last; ++k) {
    const MicroBatch& batch = batches[k];
    generator_.set_current_seed(
        derive_seed(config_.seed, "micro_batch", static_cast<uint64_t>((step - 1) * config_.micro_batches() + k)));
    for (auto& t : tensors_) t.tensor.mutable_grad() = torch::Tensor();
    const data::Batch collated = data::collate(batch.examples, model_.facts().device);
    const auto share = static_cast<double>(batch.tokens) / static_cast<double>(result.tokens);
    moe::RoutingStats own;
    const auto [answers, routers] = batch_loss(collated, batch, row_weights(collated, batch, targets, sequences), share,
                                               routing != nullptr ? &own : nullptr);
    const torch::Tensor total = routers.defined() ? answers + routers : answers;
    if (total.requires_grad()) total.backward();
    std::vector<torch::Tensor> part;
    for (const auto& t : tensors_) part.push_back(t.tensor.grad());
    part.push_back(answers.detach());
    part.push_back(routers.defined() ? routers.detach() : torch::Tensor());
    sum_.add(std::move(part));
    if (routing != nullptr) routed.push_back(own.sums());
  }
  const std::vector<torch::Tensor> sums = sum_.total(like);
  for (size_t i = 0; i < tensors_.size(); ++i) tensors_[i].tensor.mutable_grad() = sums[i];
  if (routing != nullptr) {
    auto of_part = [&](int64_t k) { return routed[k - first]; };
    for (const Json& part : ranks::deal(*group_, std::ssize(batches), of_part)) routing->add(part);
  }
  result.loss = sums[tensors_.size()].item<double>();
  const torch::Tensor& aux_loss = sums.back();
  result.aux_loss = aux_loss.defined() ? aux_loss.item<double>() : 0.0;
  result.grad_norm = clip_gradients(tensors_, config_.max_grad_norm);
  if (!std::isfinite(result.loss + result.aux_loss) || !std::isfinite(result.grad_norm)) {
    report_divergence(batches, step, result);
  }
  optimizer_->step(factor);
  return result;
}

/// [M]: the weight of each label's cross entropy in the step's loss.
torch::Tensor Stepper::row_weights(const data::Batch& collated, const MicroBatch& batch, int64_t targets,
                                   int64_t sequences) const {
  const torch::Device device = model_.facts().device;
  if (config_.loss_normalization == "tokens") {
    return torch::full({collated.num_targets()}, 1.0 / static_cast<double>(targets),
                       torch::dtype(torch::kFloat32).device(device));
  }
  std::vector<float> per_sequence;
  for (const auto& example : batch.examples) {
    per_sequence.push_back(
        static_cast<float>(1.0 / static_cast<double>(std::max<int64_t>(1, example.targets()) * sequences)));
  }
  return torch::tensor(per_sequence).to(device).index_select(0, collated.label_sequences);
}

/// Sum over the trained routers' records of the auxiliary losses with their coefficients; undefined when off.
torch::Tensor Stepper::routing_loss(const std::vector<nn::RoutingRecord>& records) const {
  torch::Tensor sum;
  for (const auto& record : records) {
    if (!record.trained) continue;
    if (config_.moe_aux_loss_coef > 0) sum = sum_of(sum, config_.moe_aux_loss_coef * moe::balance_loss(record));
    if (config_.router_z_loss_coef > 0) sum = sum_of(sum, config_.router_z_loss_coef * moe::z_loss(record));
  }
  return sum;
}

/// The cross-entropy part, with the logits' z-loss, and the routers' part (undefined when off) of the step's loss that
/// this micro-batch makes.
std::pair<torch::Tensor, torch::Tensor> Stepper::batch_loss(const data::Batch& collated, const MicroBatch& batch,
                                                            const torch::Tensor& weights, double share,
                                                            moe::RoutingStats* routing) {
  const bool has_aux = config_.moe_aux_loss_coef > 0 || config_.router_z_loss_coef > 0;
  std::vector<nn::RoutingRecord> records;
  nn::Pass pass;
  pass.training = true;
  pass.generator = generator_;
  pass.dropout = config_.dropout_rate;
  if (has_aux || routing != nullptr) pass.routing = &records;
  CheckpointedBlocks checkpointed([this](const auto& of_block) { return routing_loss(of_block); });
  if (config_.gradient_checkpointing) {
    pass.run = [&](nn::Block& block, const torch::Tensor& h, nn::Pass& of_block) {
      return checkpointed.run(block, h, of_block);
    };
  }
  const torch::Tensor hidden = model_.hidden(text_of(collated, batch.examples), pass);
  const torch::Tensor loss = model_.head().loss(hidden, collated.labels, weights, config_.z_loss_coef);
  if (routing != nullptr) routing->add(records);
  const auto trained = std::count_if(records.begin(), records.end(), [](const auto& record) { return record.trained; });
  if (!has_aux || trained == 0) return {loss, torch::Tensor()};
  const torch::Tensor aux = config_.gradient_checkpointing ? checkpointed.loss() : routing_loss(records);
  return {loss, aux * (share / static_cast<double>(trained))};
}

void Stepper::report_divergence(const std::vector<MicroBatch>& batches, int64_t step, const StepResult& result) {
  std::string where;
  for (const auto& batch : batches) {
    if (!where.empty()) break;
    where =
        models::first_not_finite(model_, text_of(data::collate(batch.examples, model_.facts().device), batch.examples));
  }
  for (const auto& t : tensors_) {
    if (where.empty() && t.tensor.grad().defined() && !t.tensor.grad().isfinite().all().item<bool>()) {
      where = "the gradient of " + t.name;
    }
  }
  throw DataError(fmt::format(
      "step {}: training diverged: loss {}, gradient norm {}; first not finite: {}\nhint: a lower learning_rate or a "
      "longer warm-up; nothing was saved, earlier checkpoints are as they were",
      step, result.loss, result.grad_norm, where.empty() ? "the loss itself" : where));
}

}  // namespace moesaic::train
