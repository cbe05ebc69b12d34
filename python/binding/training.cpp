#include "python/binding/training.h"

#include "python/binding/guarded.h"

namespace moesaic::python {

Training::Training(const std::string& keys, const std::string& file, const std::vector<std::string>& overrides,
                   bool dry) {
  guarded([&] {
    const c10::InferenceMode off(false);  // what is made here outlives the caller's mode
    const bool from_file = !file.empty();
    const OrderedJson json = from_file ? run::read_run(file, overrides) : parse_ordered_json(keys, "run");
    auto run = std::make_unique<run::Run>(run::parse_run_config(json, from_file ? file : "run"), dry);
    output_dir_ = run->config().train.output_dir.string();
    if (dry) run->check_start();
    plan_ = run->plan().text();
    if (!dry) {
      run_ = std::move(run);
      return;
    }
    run->check_rows();
    plan_ += run->needs_plan().text();
  });
}

c10::intrusive_ptr<Job> Training::start() {
  return guarded([&] {
    MOESAIC_CHECK(run_, UsageError, "start: got a run that was begun or only planned, expected a new one");
    return c10::make_intrusive<Job>([run = std::shared_ptr(std::move(run_))](Job& job) {
      train::TrainHooks hooks;
      hooks.stop = [&] { return job.stopping(); };
      hooks.on_log = [&](const train::StepLog& log) {
        job.tell(Json{{"step", log.step},
                      {"max_steps", log.max_steps},
                      {"loss", log.loss},
                      {"learning_rate", log.learning_rate},
                      {"grad_norm", log.grad_norm},
                      {"tokens_per_second", log.tokens_per_second},
                      {"aux_loss", log.aux_loss},
                      {"tokens", log.tokens},
                      {"seconds", log.seconds}}
                     .dump());
      };
      hooks.on_row = [&](const Json& row) {
        job.tell(Json{{"row", row}}.dump(-1, ' ', false, Json::error_handler_t::replace));
      };
      const train::TrainResult result = run->train(hooks, "moesaic.train()");
      Json best = nullptr;
      if (result.best) {
        best = {{"metric", result.best->metric}, {"value", result.best->value}, {"step", result.best->step}};
      }
      return Json{{"steps", result.steps},
                  {"train_loss", result.train_loss},
                  {"best", best},
                  {"interrupted", result.interrupted},
                  {"stopped_early", result.stopped_early},
                  {"seconds", result.seconds},
                  {"tokens", result.tokens}}
          .dump();
    });
  });
}

}  // namespace moesaic::python
