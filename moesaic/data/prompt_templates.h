// Prompt templates in promptsource's form: a raw row becomes a prompt and its answer.
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/base/row_template.h"

namespace moesaic::data {

/// One template of a data set, as its file has it.
struct PromptTemplate {
  std::string id, name;
  std::string jinja;                          // prompt ||| answer
  std::optional<std::string> answer_choices;  // Jinja of the choices, with ||| between them
  bool original_task = false;                 // asks for what the data set was made for
  bool choices_in_prompt = false;
  std::vector<std::string> metrics;
};

/// What a template makes of a row.
struct RenderedPrompt {
  std::string input;
  std::vector<std::string> targets;  // the right answer; several where each of them is right
  std::vector<std::string> choices;  // empty: an open answer
};

/// The templates of one data set: a templates.yaml of the package promptsource, or one like it.
///
/// The rules are those of promptsource's Template.apply and of T0's tasks: names of fields have '_' for '-'; what a
/// template prints is cut to 2,048 characters between words, each print alone; `|||` parts prompt from answer, except
/// where it comes from the data; both are stripped; an empty answer is "<NO LABEL>". `choice` takes what the seed says,
/// so that a row has the same words each time.
class PromptTemplates {
 public:
  /// `path`: the file, or a folder with a templates.yaml in it. Throws FormatError that names all that is wrong, with
  /// file and line.
  static PromptTemplates load(const std::filesystem::path& path);
  /// The same of a file's text; `where` names it in messages.
  static PromptTemplates parse(const std::string& text, const std::string& where);

  const std::vector<PromptTemplate>& templates() const { return templates_; }
  /// All of a template that decides what it makes of rows.
  std::string source(size_t index) const;

  /// nullopt: the template gives this row nothing (no prompt, or not one `|||`). Throws DataError that names the
  /// template and its line in the file. Safe from several threads.
  std::optional<RenderedPrompt> render(size_t index, const OrderedJson& row, uint64_t seed) const;

 private:
  struct Compiled {
    RowTemplate jinja;
    std::optional<RowTemplate> answer_choices;
  };

  std::vector<PromptTemplate> templates_;
  std::vector<Compiled> compiled_;
};

}  // namespace moesaic::data
