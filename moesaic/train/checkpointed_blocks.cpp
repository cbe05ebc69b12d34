#include "moesaic/train/checkpointed_blocks.h"

#include "moesaic/nn/source.h"

namespace moesaic::train {
namespace {

at::Generator generator_of(const nn::Pass& pass, torch::Device device) {
  return pass.generator ? *pass.generator : at::globalContext().defaultGenerator(device);
}

torch::Tensor state_of(at::Generator generator) {
  const std::lock_guard lock(generator.mutex());
  return generator.get_state();
}

void set_state(at::Generator generator, const torch::Tensor& state) {
  const std::lock_guard lock(generator.mutex());
  generator.set_state(state);
}

struct BlockResult {
  torch::Tensor hidden;        // [N, d]
  torch::Tensor routing_loss;  // scalar, 0 without records
};

/// What the second run of a block needs.
struct BlockRun : torch::CustomClassHolder {
  nn::Block* block;
  nn::Pass pass;
  RoutingLoss routing_loss;
  torch::Tensor random;  // the generator's state

  /// The block's output and the loss over its routing. source: what cross-attention reads.
  BlockResult run(const torch::Tensor& hidden, const torch::Tensor& source, std::vector<nn::RoutingRecord>& records) {
    const bool collects = pass.routing != nullptr;
    nn::Pass own = pass;
    if (pass.source != nullptr) {
      own.source = std::make_shared<nn::Source>(*pass.source);
      own.source->states = source;
    }
    own.routing = collects ? &records : nullptr;
    BlockResult result;
    result.hidden = block->forward(hidden, own);
    if (collects && routing_loss) result.routing_loss = routing_loss(records);
    if (!result.routing_loss.defined()) {
      result.routing_loss = torch::zeros({}, hidden.options().dtype(torch::kFloat32).requires_grad(false));
    }
    return result;
  }
};

class CheckpointedBlock : public torch::autograd::Function<CheckpointedBlock> {
 public:
  /// source: the encoder's states that the block reads, or nothing, [0]. `anchor` requires grad, so that the output
  /// does even where `hidden` does not: the block's own leaves need it.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const torch::Tensor& hidden,
                                                const torch::Tensor& source, const torch::Tensor& anchor,
                                                c10::intrusive_ptr<BlockRun> block_run,
                                                std::vector<nn::RoutingRecord>* records) {
    const BlockResult result = block_run->run(hidden, source, *records);
    context->save_for_backward({hidden, source});
    context->saved_data["run"] = c10::IValue::make_capsule(block_run);
    context->saved_data["needs_hidden"] = hidden.requires_grad();
    context->saved_data["needs_source"] = source.requires_grad();
    return {result.hidden, result.routing_loss};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    auto block_run = c10::static_intrusive_pointer_cast<BlockRun>(context->saved_data["run"].toCapsule());
    const bool needs_hidden = context->saved_data["needs_hidden"].toBool();
    torch::Tensor hidden = context->get_saved_variables()[0].detach().requires_grad_(needs_hidden);
    const bool needs_source = context->saved_data["needs_source"].toBool();
    torch::Tensor source = context->get_saved_variables()[1].detach().requires_grad_(needs_source);

    const at::Generator generator = generator_of(block_run->pass, hidden.device());
    const torch::Tensor current = state_of(generator);
    set_state(generator, block_run->random);
    BlockResult result;
    std::vector<nn::RoutingRecord> records;
    {
      torch::AutoGradMode grad(true);
      result = block_run->run(hidden, source, records);
    }
    set_state(generator, current);

    torch::autograd::variable_list outputs{result.hidden}, output_gradients{gradients[0]};
    if (result.routing_loss.requires_grad()) {
      outputs.push_back(result.routing_loss);
      output_gradients.push_back(gradients[1]);
    }
    torch::autograd::backward(outputs, output_gradients);
    return {hidden.grad(), source.grad(), {}, {}, {}};
  }
};

}  // namespace

torch::Tensor CheckpointedBlocks::run(nn::Block& block, const torch::Tensor& hidden, nn::Pass& pass) {
  const bool reads = pass.source != nullptr && pass.source->states.defined();
  const torch::Tensor source = reads ? pass.source->states : torch::empty({0}, hidden.options().requires_grad(false));
  const bool graph = hidden.requires_grad() || source.requires_grad() || block.trains();
  if (!torch::GradMode::is_enabled() || !graph) return block.forward(hidden, pass);
  auto run = c10::make_intrusive<BlockRun>();
  run->block = &block;
  run->pass = pass;
  run->pass.run = nullptr;
  run->routing_loss = routing_loss_;
  run->random = state_of(generator_of(pass, hidden.device()));
  std::vector<nn::RoutingRecord> records;
  const auto anchor = torch::zeros({}, hidden.options().dtype(torch::kFloat32)).requires_grad_(true);
  const auto outputs = CheckpointedBlock::apply(hidden, source, anchor, run, &records);
  if (pass.routing != nullptr) pass.routing->insert(pass.routing->end(), records.begin(), records.end());
  loss_ = loss_.defined() ? loss_ + outputs[1] : outputs[1];
  return outputs[0];
}

}  // namespace moesaic::train
