// Runs the C++ side of test_tokenizer.py: one JSON job per line on stdin, one JSON answer per line on stdout.
//
//   {op: load, json, config, template}         the tokenizer (tokenizer.json's text) and, if given, its chat template
//   {op: open, folder}                         the tokenizer of a model's folder
//   {op: encode, text, special}                -> ids, offsets (bytes), fast (ids without the offsets)
//   {op: decode, ids, skip}                    -> text, pieces (of the streaming decoder)
//   {op: render, messages, tools, prompt, extra} -> text
//   {op: train, messages, tools}               -> text, trained, ids, mask
#include <iostream>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace {

using moesaic::Json;
using moesaic::OrderedJson;
using namespace moesaic::tokenizer;

class Session {
 public:
  OrderedJson run(const OrderedJson& job) {
    const std::string op = job.at("op");
    if (op == "load") return load(job);
    if (op == "open") {
      tokenizer_ = Tokenizer::open(*moesaic::formats::open_folder(job.at("folder").get<std::string>(), false));
      return facts();
    }
    if (op == "encode") return encode(job);
    if (op == "decode") return decode(job);
    if (op == "render") {
      return {
          {"text", template_->render(job.at("messages"), job.value("prompt", false), job.value("tools", OrderedJson()),
                                     job.value("extra", OrderedJson::object()))}};
    }
    if (op == "train") return train(job);
    throw moesaic::UsageError("unknown op " + op);
  }

 private:
  OrderedJson load(const OrderedJson& job) {
    template_.reset();
    tokenizer_ = std::make_shared<Tokenizer>(job.at("json").get<std::string>(),
                                             Json::parse(job.value("config", OrderedJson::object()).dump()), "test");
    if (job.contains("template")) {
      template_ = std::make_unique<ChatTemplate>(job["template"].get<std::string>(), *tokenizer_);
    }
    return facts();
  }

  OrderedJson facts() const {
    const auto id = [](std::optional<int64_t> id) { return id ? OrderedJson(*id) : OrderedJson(); };
    return {{"bos_id", id(tokenizer_->bos_id())},
            {"eos_id", id(tokenizer_->eos_id())},
            {"vocab_size", tokenizer_->vocab_size()}};
  }

  OrderedJson encode(const OrderedJson& job) {
    const std::string text = job.at("text");
    const bool special = job.value("special", false);
    const Encoding encoding = tokenizer_->encode_with_offsets(text, special);
    return {{"ids", encoding.ids}, {"offsets", encoding.offsets}, {"fast", tokenizer_->encode(text, special)}};
  }

  OrderedJson decode(const OrderedJson& job) {
    const std::vector<int64_t> ids = job.at("ids");
    const bool skip = job.value("skip", false);
    StreamDecoder stream(tokenizer_, skip);
    std::vector<std::string> pieces;
    for (int64_t id : ids) pieces.push_back(stream.push(id));
    pieces.push_back(stream.finish());
    return {{"text", tokenizer_->decode(ids, skip)}, {"pieces", pieces}};
  }

  OrderedJson train(const OrderedJson& job) {
    const RenderedChat chat = template_->render_for_training(job.at("messages"), job.value("tools", OrderedJson()));
    const Encoding encoding = tokenizer_->encode_with_offsets(chat.text, false);
    return {{"text", chat.text}, {"trained", chat.trained}, {"ids", encoding.ids}, {"mask", loss_mask(encoding, chat)}};
  }

  std::shared_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ChatTemplate> template_;
};

}  // namespace

int main() {
  Session session;
  std::string line;
  while (std::getline(std::cin, line)) {
    OrderedJson answer;
    try {
      answer = session.run(OrderedJson::parse(line));
      answer["ok"] = true;
    } catch (const std::exception& e) {
      answer = {{"ok", false}, {"error", e.what()}};
    }
    std::cout << answer.dump() << std::endl;
  }
}
