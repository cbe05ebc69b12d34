#include "moesaic/train/layer_checkpoint.h"

#include <ATen/CPUGeneratorImpl.h>

namespace moesaic::train {
namespace {

std::vector<at::Generator> generators(torch::Device device) {
  std::vector<at::Generator> found{at::detail::getDefaultCPUGenerator()};
  if (!device.is_cpu()) found.push_back(at::globalContext().defaultGenerator(device));
  return found;
}

/// What the second run of a layer needs.
struct LayerRun : torch::CustomClassHolder {
  models::CausalLM* model;
  int64_t layer;
  nn::ForwardContext context;
  RoutingLoss routing_loss;
  bool collects_routing;
  std::vector<torch::Tensor> random;

  /// The layer's output and the loss over its routing.
  LayerResult run(const torch::Tensor& hidden, std::vector<nn::RoutingRecord>& records) {
    context.routing = collects_routing ? &records : nullptr;
    LayerResult result;
    result.hidden = model->run_layers(hidden, layer, layer + 1, context);
    if (collects_routing && routing_loss) result.routing_loss = routing_loss(records);
    if (!result.routing_loss.defined()) {
      result.routing_loss = torch::zeros({}, hidden.options().dtype(torch::kFloat32).requires_grad(false));
    }
    return result;
  }
};

class CheckpointedLayer : public torch::autograd::Function<CheckpointedLayer> {
 public:
  /// `anchor` requires grad, so that the output does even where `hidden` does not: the layer's own leaves need it.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const torch::Tensor& hidden,
                                                const torch::Tensor& anchor, c10::intrusive_ptr<LayerRun> layer_run,
                                                std::vector<nn::RoutingRecord>* records) {
    const LayerResult result = layer_run->run(hidden, *records);
    context->save_for_backward({hidden});
    context->saved_data["run"] = c10::IValue::make_capsule(layer_run);
    context->saved_data["needs_hidden"] = hidden.requires_grad();
    return {result.hidden, result.routing_loss};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    auto layer_run = c10::static_intrusive_pointer_cast<LayerRun>(context->saved_data["run"].toCapsule());
    const bool needs_hidden = context->saved_data["needs_hidden"].toBool();
    torch::Tensor hidden = context->get_saved_variables()[0].detach().requires_grad_(needs_hidden);

    const auto device = hidden.device();
    const auto current = random_state(device);
    set_random_state(device, layer_run->random);
    LayerResult result;
    std::vector<nn::RoutingRecord> records;
    {
      torch::AutoGradMode grad(true);
      result = layer_run->run(hidden, records);
    }
    set_random_state(device, current);

    torch::autograd::variable_list outputs{result.hidden}, output_gradients{gradients[0]};
    if (result.routing_loss.requires_grad()) {
      outputs.push_back(result.routing_loss);
      output_gradients.push_back(gradients[1]);
    }
    torch::autograd::backward(outputs, output_gradients);
    return {hidden.grad(), {}, {}, {}};
  }
};

}  // namespace

std::vector<torch::Tensor> random_state(torch::Device device) {
  std::vector<torch::Tensor> states;
  for (auto& generator : generators(device)) {
    std::lock_guard<std::mutex> lock(generator.mutex());
    states.push_back(generator.get_state());
  }
  return states;
}

void set_random_state(torch::Device device, const std::vector<torch::Tensor>& state) {
  auto all = generators(device);
  for (size_t i = 0; i < all.size(); ++i) {
    std::lock_guard<std::mutex> lock(all[i].mutex());
    all[i].set_state(state[i]);
  }
}

LayerResult run_layer_checkpointed(models::CausalLM& model, int64_t layer, const torch::Tensor& hidden,
                                   nn::ForwardContext& context, const RoutingLoss& routing_loss) {
  auto run = c10::make_intrusive<LayerRun>();
  run->model = &model;
  run->layer = layer;
  run->context = context;
  run->routing_loss = routing_loss;
  run->collects_routing = context.routing != nullptr;
  run->random = random_state(hidden.device());
  std::vector<nn::RoutingRecord> records;
  const auto anchor = torch::zeros({}, hidden.options().dtype(torch::kFloat32)).requires_grad_(true);
  const auto outputs = CheckpointedLayer::apply(hidden, anchor, run, &records);
  if (context.routing != nullptr) {
    context.routing->insert(context.routing->end(), records.begin(), records.end());
  }
  return {outputs[0], outputs[1]};
}

}  // namespace moesaic::train
