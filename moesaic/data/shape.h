// The shapes people have their data in, read into one: Row.
#pragma once
#include <string>

#include "moesaic/data/dataset.h"
#include "moesaic/data/record_file.h"

namespace moesaic::data {

/// How the records of one file are to be read. Names of columns and roles default to LLaMA-Factory's.
class Shape {
 public:
  /// Finds the formatting from the keys of `first`, a record, where the config says auto. Throws UsageError for an
  /// unknown formatting, column or tag, DataError when the keys fit none.
  Shape(const DatasetConfig& config, const OrderedJson& header, const OrderedJson& first, const std::string& where);

  /// Throws DataError with `where`, got and expected.
  Row row(const OrderedJson& record, const std::string& where) const;
  const std::string& formatting() const { return formatting_; }

 private:
  std::string column(const char* name) const { return columns_.value(name, std::string()); }
  std::string tag(const char* name) const { return tags_.value(name, std::string()); }
  Row alpaca(const OrderedJson& record, const std::string& where) const;
  Row conversation(const OrderedJson& record, const std::string& where) const;
  OrderedJson turn_of(const OrderedJson& message, const std::string& where) const;
  std::string role_of(const std::string& name, const std::string& where) const;
  Row superni(const OrderedJson& record, const std::string& where) const;
  Row prompted(const OrderedJson& record, const std::string& where) const;

  std::string formatting_;
  Json columns_, tags_;
  std::string definition_;  // superni
  std::shared_ptr<const PromptTemplates> prompts_;
  size_t prompt_ = 0;
};

}  // namespace moesaic::data
