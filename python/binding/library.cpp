// What Python finds below torch.classes.moesaic and torch.ops.moesaic. python/moesaic/ is what people use.
#include <torch/library.h>

#include "moesaic/base/device.h"
#include "moesaic/base/log.h"
#include "moesaic/base/version.h"
#include "moesaic/eval/routes.h"
#include "moesaic/run/compose.h"
#include "python/binding/guarded.h"
#include "python/binding/model.h"
#include "python/binding/training.h"

namespace moesaic::python {

TORCH_LIBRARY(moesaic, library) {
  library.class_<Job>("Job")
      .def("wait", &Job::wait)
      .def("take", &Job::take)
      .def("stop", &Job::stop)
      .def("result", &Job::result);
  library.class_<Model>("Model")
      .def(torch::init([](const std::string& named, const std::string& device, const std::string& dtype, bool int8) {
        return guarded([&] { return c10::make_intrusive<Model>(named, device, dtype, int8); });
      }))
      .def("facts", &Model::facts)
      .def("attach_new", &Model::attach_new)
      .def("attach_folder", &Model::attach_folder)
      .def("detach", &Model::detach)
      .def("set_trainable", &Model::set_trainable)
      .def("save", &Model::save)
      .def("parameters", &Model::parameters)
      .def("base_parameters", &Model::base_parameters)
      .def("text_ids", &Model::text_ids)
      .def("answer_ids", &Model::answer_ids)
      .def("chat_ids", &Model::chat_ids)
      .def("decode", &Model::decode)
      .def("forward", &Model::forward)
      .def("score", &Model::score)
      .def("generate", &Model::generate)
      .def("evaluate", &Model::evaluate)
      .def("routes", &Model::routes);
  library.class_<Training>("Training")
      .def(torch::init([](const std::string& keys, const std::string& file, const std::vector<std::string>& overrides,
                          bool dry) { return c10::make_intrusive<Training>(keys, file, overrides, dry); }))
      .def("plan", &Training::plan)
      .def("output_dir", &Training::output_dir)
      .def("start", &Training::start);
  library.def("set_log_level(str level) -> ()",
              [](const std::string& level) { guarded([&] { set_log_level(level); }); });
  library.def("routes_page(str routes) -> str", [](const std::string& routes) {
    return guarded([&] { return eval::routes_html(parse_ordered_json(routes, "routes")); });
  });
  library.def("compose(str keys, str device, str dtype, int seed) -> str",
              [](const std::string& keys, const std::string& device, const std::string& dtype, int64_t seed) {
                return guarded([&] {
                  const torch::Device place = parse_device(device);
                  const models::LoadOptions load{number_format(dtype, place).dtype, place, false};
                  return run::compose_models(Json(parse_ordered_json(keys, "compose")), "compose", seed, load).text();
                });
              });
  library.def("version() -> str", [] { return std::string(kVersion); });
}

}  // namespace moesaic::python
