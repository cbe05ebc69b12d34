// Renders rows: {"templates": path, "rows": [JSON text], "seed"} -> {"ok", "names", "rendered"}: of each row, of each
// template null or {input, targets, choices}, or {error}.
#include "moesaic/data/prompt_templates.h"
#include "tests/parity/answer_lines.h"

int main() {
  using namespace moesaic;
  return test::answer_lines([](const Json& job) {
    const auto templates = data::PromptTemplates::load(job.at("templates").get<std::string>());
    Json names = Json::array(), rendered = Json::array();
    for (const data::PromptTemplate& each : templates.templates()) names.push_back(each.name);
    for (const std::string text : job.at("rows")) {
      const OrderedJson row = parse_ordered_json(text, "row");
      Json& made = rendered.emplace_back(Json::array());
      for (size_t i = 0; i < templates.templates().size(); ++i) {
        try {
          const auto prompt = templates.render(i, row, job.value("seed", uint64_t{0}));
          made.push_back(
              prompt ? Json{{"input", prompt->input}, {"targets", prompt->targets}, {"choices", prompt->choices}}
                     : Json());
        } catch (const DataError& error) {
          made.push_back({{"error", error.what()}});
        }
      }
    }
    return Json{{"ok", true}, {"names", names}, {"rendered", rendered}};
  });
}
