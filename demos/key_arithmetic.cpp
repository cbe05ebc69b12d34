#include "demos/key_arithmetic.h"

#include <random>

#include "moesaic/base/seed.h"

namespace moesaic::demos {
namespace {

using Ids = std::vector<int64_t>;

constexpr int64_t kKeys = 500, kHeldIn = 100, kValues = 100;
// Ids: digits 0 to 9, then these, then the keys.
enum : int64_t { kPlus = 10, kMinus, kTimes, kEquals, kSays, kFiller, kBos, kEos, kPad, kSign, kFirstKey };
static_assert(kFirstKey + kKeys == kKeyVocabulary);

int64_t draw(std::mt19937_64& random, int64_t below) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(below));
}

/// Each value five times over the keys. Keys 0 .. 99 are held in.
const Ids& key_values() {
  static const Ids values = draw_key_values(kKeys, kValues, 0);
  return values;
}

struct Expression {
  int64_t left, op, right;
  int64_t result() const { return op == kPlus ? left + right : left - right; }
  /// A tenth of all expressions of numbers.
  bool held_out() const {
    return derive_seed(0, "held-out expression", static_cast<uint64_t>((left * 2 + (op == kMinus)) * kValues + right)) %
               10 ==
           0;
  }
};

void append(Ids& ids, std::initializer_list<int64_t> more) { ids.insert(ids.end(), more); }
void append_expression(Ids& ids, const Expression& e) {
  append(ids, {e.left / 10, e.left % 10, e.op, e.right / 10, e.right % 10});
}
/// Units first, so that every digit follows from those written before it.
void append_answer(Ids& ids, const Expression& e) {
  append(ids, {e.result() % 10, e.result() / 10 % 10, e.result() / 100});
}

int64_t draw_operator(std::mt19937_64& random) { return draw(random, 2) == 0 ? kPlus : kMinus; }

/// Two keys of first .. last-1 and what they make, redrawn until `wanted`.
template <class Wanted>
std::pair<Ids, Expression> draw_keys(std::mt19937_64& random, int64_t first, int64_t last, const Wanted& wanted) {
  while (true) {
    const int64_t left = first + draw(random, last - first), right = first + draw(random, last - first);
    const Expression e{key_values()[left], draw_operator(random), key_values()[right]};
    if (e.result() >= 0 && wanted(e)) return {{kFirstKey + left, e.op, kFirstKey + right}, e};
  }
}
template <class Wanted>
Expression draw_numbers(std::mt19937_64& random, const Wanted& wanted) {
  while (true) {
    const Expression e{draw(random, kValues), draw_operator(random), draw(random, kValues)};
    if (e.result() >= 0 && wanted(e)) return e;
  }
}
/// `<bos> [K op K] >` with keys that have nothing to do with what follows.
Ids arithmetic_prompt(std::mt19937_64& random) {
  Ids ids{kBos};
  if (draw(random, 2) == 0) {
    append(ids, {kFirstKey + draw(random, kKeys), draw_operator(random), kFirstKey + draw(random, kKeys)});
  }
  ids.push_back(kSays);
  return ids;
}

}  // namespace

std::vector<int64_t> draw_key_values(int64_t keys, int64_t values, uint64_t seed) {
  Ids permutation(keys);
  std::iota(permutation.begin(), permutation.end(), 0);
  std::mt19937_64 random(derive_seed(seed, "key values"));
  for (int64_t i = keys - 1; i > 0; --i) std::swap(permutation[i], permutation[draw(random, i + 1)]);
  for (int64_t& value : permutation) value %= values;
  return permutation;
}

std::vector<std::string> draw_key_names(int64_t keys, uint64_t seed) {
  constexpr std::string_view consonants = "bcdfghjklmnprstvwz", vowels = "aeiou";
  std::mt19937_64 random(derive_seed(seed, "key names"));
  std::set<std::string> seen;
  std::vector<std::string> names;
  while (std::ssize(names) < keys) {
    std::string name;
    for (int64_t i = 0, length = 2 + draw(random, 5); i < length; ++i) {
      const std::string_view letters = i % 2 == 0 ? consonants : vowels;
      name += letters[static_cast<size_t>(draw(random, std::ssize(letters)))];
    }
    if (seen.insert(name).second) names.push_back(name);
  }
  return names;
}

int64_t key_bos_id() { return kBos; }
int64_t key_eos_id() { return kEos; }

Json key_tokenizer_json() {
  Json vocabulary = Json::object();
  for (int64_t digit = 0; digit < 10; ++digit) vocabulary[std::to_string(digit)] = digit;
  const std::vector<std::string> names = draw_key_names(kKeys, 0);
  for (const auto& [name, id] : {std::pair("+", kPlus),
                                 {"-", kMinus},
                                 {"*", kTimes},
                                 {"=", kEquals},
                                 {">", kSays},
                                 {".", kFiller},
                                 {"<bos>", kBos},
                                 {"<eos>", kEos},
                                 {"<pad>", kPad},
                                 {"~", kSign}}) {
    vocabulary[name] = id;
  }
  for (int64_t key = 0; key < kKeys; ++key) vocabulary[names[key]] = kFirstKey + key;
  Json added = Json::array();
  for (const auto& [name, id] : {std::pair("<bos>", kBos), {"<eos>", kEos}, {"<pad>", kPad}}) {
    added.push_back({{"id", id},
                     {"content", name},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  const Json begin{{"SpecialToken", {{"id", "<bos>"}, {"type_id", 0}}}};
  auto sequence = [](const char* id, int64_t type) { return Json{{"Sequence", {{"id", id}, {"type_id", type}}}}; };
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
          {"post_processor",
           {{"type", "TemplateProcessing"},
            {"single", Json::array({begin, sequence("A", 0)})},
            {"pair", Json::array({begin, sequence("A", 0), sequence("B", 1)})},
            {"special_tokens",
             {{"<bos>", {{"id", "<bos>"}, {"ids", Json::array({kBos})}, {"tokens", Json::array({"<bos>"})}}}}}}},
          {"decoder", nullptr},
          {"model", {{"type", "WordLevel"}, {"vocab", vocabulary}, {"unk_token", "."}}}};
}

Json key_tokenizer_config() { return {{"bos_token", "<bos>"}, {"eos_token", "<eos>"}, {"pad_token", "<pad>"}}; }

std::vector<KeyQuestion> key_questions(KeyTask task, int64_t count, uint64_t seed) {
  std::mt19937_64 random(derive_seed(seed, "key questions", static_cast<uint64_t>(task)));
  const auto held_out = [](const Expression& e) { return e.held_out(); };
  const auto any = [](const Expression&) { return true; };
  std::vector<KeyQuestion> questions;
  for (int64_t i = 0; i < count; ++i) {
    KeyQuestion& question = questions.emplace_back();
    if (task == KeyTask::kCalculate) {
      const Expression e = draw_numbers(random, held_out);
      question.prompt = arithmetic_prompt(random);
      append_expression(question.prompt, e);
      question.prompt.push_back(kEquals);
      append_answer(question.wanted, e);
      continue;
    }
    const bool both = task == KeyTask::kBoth;
    const auto [keys, e] = both ? draw_keys(random, kHeldIn, kKeys, held_out) : draw_keys(random, kHeldIn, kKeys, any);
    question.prompt = {kBos};
    question.prompt.insert(question.prompt.end(), keys.begin(), keys.end());
    question.prompt.push_back(kSays);
    both ? append_answer(question.wanted, e) : append_expression(question.wanted, e);
  }
  return questions;
}

bool key_answer_is_right(KeyTask task, const KeyQuestion& question, const std::vector<int64_t>& answer) {
  auto begin = answer.begin(), end = std::find(answer.begin(), answer.end(), int64_t{kEos});
  if (task == KeyTask::kSubstitute) end = std::find(begin, end, int64_t{kEquals});
  if (task == KeyTask::kBoth) {
    const auto equals = std::find(std::make_reverse_iterator(end), answer.rend(), int64_t{kEquals});
    if (equals == answer.rend()) return false;
    begin = equals.base();
  }
  return end != answer.end() && std::equal(begin, end, question.wanted.begin(), question.wanted.end());
}

std::optional<data::Example> KeyTexts::next() {
  const KeyText kind = mix_[static_cast<size_t>(position_ % std::ssize(mix_))];
  std::mt19937_64 random(derive_seed(seed_, "key texts", static_cast<uint64_t>(position_++)));
  const auto trained = [](const Expression& e) { return !e.held_out(); };
  data::Example example;
  Ids& ids = example.ids;
  Expression e;
  if (kind == KeyText::kArithmetic) {
    ids = arithmetic_prompt(random);
    e = draw_numbers(random, trained);
  } else {
    Ids keys;
    std::tie(keys, e) = kind == KeyText::kComposed
                            ? draw_keys(random, 0, kHeldIn, trained)
                            : draw_keys(random, 0, kKeys, [](const Expression&) { return true; });
    if (kind == KeyText::kOtherwise) {
      for (const size_t k : {0, 2}) keys[k] = kFirstKey + (keys[k] - kFirstKey + 1) % kKeys;
    }
    ids = {kBos};
    ids.insert(ids.end(), keys.begin(), keys.end());
    ids.push_back(kSays);
  }
  const size_t substitution = ids.size();
  append_expression(ids, e);
  const size_t equals = ids.size();
  if (kind == KeyText::kArithmetic || kind == KeyText::kComposed) {
    ids.push_back(kEquals);
    append_answer(ids, e);
  }
  ids.push_back(kEos);
  const size_t learnt = kind == KeyText::kArithmetic ? equals : substitution;
  example.mask.assign(ids.size(), 0);
  std::fill(example.mask.begin() + static_cast<ptrdiff_t>(learnt), example.mask.end(), 1);
  example.end_prompts_by_mask();
  return example;
}

}  // namespace moesaic::demos
