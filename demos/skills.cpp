#include "demos/skills.h"

#include <algorithm>
#include <array>
#include <set>
#include <span>

#include "moesaic/base/output_folder.h"
#include "moesaic/data/order.h"

namespace moesaic::demos {
namespace {

constexpr uint64_t kSplitSeed = 0x736b696c6c73;  // of the split; not the user's seed
constexpr uint64_t kTestShare = 5;               // one question in so many is a test question

using Texts = std::vector<std::string>;

/// Random choices that are the same on every machine.
class Chooser {
 public:
  explicit Chooser(uint64_t seed) : seed_(seed) {}
  /// low <= result <= high.
  int between(int low, int high) {
    return low + static_cast<int>(data::hash_mix(seed_, step_++) % static_cast<uint64_t>(high - low + 1));
  }
  const std::string& of(const Texts& texts) { return texts[between(0, static_cast<int>(texts.size()) - 1)]; }
  /// `count` different texts in random order.
  Texts sample(Texts texts, int count) {
    for (int i = 0; i < count; ++i) std::swap(texts[i], texts[between(i, static_cast<int>(texts.size()) - 1)]);
    texts.resize(count);
    return texts;
  }

 private:
  uint64_t seed_;
  uint64_t step_ = 0;
};

/// `content` decides the split; `question` is one wording of it.
struct Question {
  std::string content, question, answer;
};

const Texts kWords{"apple", "river", "stone", "cloud", "green", "house", "music", "paper", "horse", "light",
                   "table", "bread", "ocean", "tiger", "glass", "chair", "night", "train", "lemon", "sugar",
                   "world", "heart", "smile", "plant", "snow",  "fire",  "gold",  "ship",  "moon",  "tree"};
const Texts kColours{"red", "blue", "green", "black", "white", "yellow"};
const Texts kThings{"pen", "lamp", "book", "cup", "hat", "ball", "key", "bag", "shoe", "clock", "ring", "box"};
const Texts kNames{"Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack"};
const Texts kDays{"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"};

std::string join(const Texts& texts, const char* separator) { return fmt::format("{}", fmt::join(texts, separator)); }

Texts random_numbers(Chooser& choose, int count) {
  std::set<int> numbers;
  while (static_cast<int>(numbers.size()) < count) numbers.insert(choose.between(1, 99));
  Texts texts;
  for (int number : numbers) texts.push_back(std::to_string(number));
  return choose.sample(texts, count);
}

/// Fills the wording's single {}.
std::string ask(Chooser& choose, const Texts& wordings, const std::string& content) {
  return fmt::format(fmt::runtime(choose.of(wordings)), content);
}

Question reverse_words(Chooser& choose) {
  Texts words = choose.sample(kWords, choose.between(3, 5));
  std::string content = join(words, " ");
  std::reverse(words.begin(), words.end());
  static const Texts kWordings{"Write these words in reverse order: {}", "Reverse the order of the words: {}",
                               "List the words from last to first: {}", "{}\nSay these words backwards."};
  return {content, ask(choose, kWordings, content), join(words, " ")};
}

Question sort_numbers(Chooser& choose) {
  Texts numbers = random_numbers(choose, choose.between(3, 4));
  std::string content = join(numbers, " ");
  std::sort(numbers.begin(), numbers.end(), [](const auto& a, const auto& b) { return std::stoi(a) < std::stoi(b); });
  static const Texts kWordings{"Sort these numbers from smallest to largest: {}", "Put in ascending order: {}",
                               "Arrange the numbers in increasing order: {}", "{}\nSort them, smallest first."};
  return {content, ask(choose, kWordings, content), join(numbers, " ")};
}

Question extreme(Chooser& choose, const Texts& wordings, bool largest) {
  Texts numbers = random_numbers(choose, choose.between(4, 6));
  std::string content = join(numbers, ", ");
  auto less = [](const auto& a, const auto& b) { return std::stoi(a) < std::stoi(b); };
  auto found = largest ? std::max_element(numbers.begin(), numbers.end(), less)
                       : std::min_element(numbers.begin(), numbers.end(), less);
  return {content, ask(choose, wordings, content), *found};
}

Question maximum(Chooser& choose) {
  static const Texts kWordings{"What is the largest number in this list? {}", "Find the maximum: {}",
                               "Which of these numbers is the biggest? {}", "{}\nGive the greatest number."};
  return extreme(choose, kWordings, true);
}

Question minimum(Chooser& choose) {
  static const Texts kWordings{"What is the smallest number in this list? {}", "Find the minimum: {}",
                               "Which of these numbers is the least? {}"};
  return extreme(choose, kWordings, false);
}

/// A price list and one of its lines.
struct PriceList {
  std::string text, thing, price;
};

PriceList price_list(Chooser& choose) {
  const int count = choose.between(3, 5);
  Texts things = choose.sample(kThings, count), prices = random_numbers(choose, count), lines;
  for (int i = 0; i < count; ++i) lines.push_back(things[i] + " " + prices[i]);
  const int asked = choose.between(0, count - 1);
  return {join(lines, ", "), things[asked], prices[asked]};
}

Question lookup(Chooser& choose) {
  PriceList list = price_list(choose);
  static const Texts kWordings{"Prices: {}. What does the {} cost?", "Price list: {}. How much is the {}?",
                               "Here are some prices: {}. Give the price of the {}."};
  return {list.text + "|" + list.thing, fmt::format(fmt::runtime(choose.of(kWordings)), list.text, list.thing),
          list.price};
}

Question inverse_lookup(Chooser& choose) {
  PriceList list = price_list(choose);
  static const Texts kWordings{"Prices: {}. Which thing costs {}?", "Price list: {}. What can be bought for {}?"};
  return {list.text + "|" + list.price, fmt::format(fmt::runtime(choose.of(kWordings)), list.text, list.price),
          list.thing};
}

Question unit_conversion(Chooser& choose) {
  struct Unit {
    const char *from, *to;
    int factor;
  };
  static const std::array<Unit, 8> kUnits{{{"meters", "centimeters", 100},
                                           {"kilometers", "meters", 1000},
                                           {"kilograms", "grams", 1000},
                                           {"liters", "milliliters", 1000},
                                           {"centimeters", "millimeters", 10},
                                           {"hours", "minutes", 60},
                                           {"feet", "inches", 12},
                                           {"weeks", "days", 7}}};
  const Unit& unit = kUnits[choose.between(0, static_cast<int>(kUnits.size()) - 1)];
  // Factors that are not round stay in the range of a multiplication table.
  const int amount = choose.between(2, unit.factor % 10 == 0 && unit.factor != 60 ? 99 : 12);
  static const Texts kWordings{"Convert {0} {1} to {2}.", "How many {2} are {0} {1}?", "Express {0} {1} in {2}.",
                               "{0} {1} = ? {2}"};
  return {fmt::format("{} {}", amount, unit.from),
          fmt::format(fmt::runtime(choose.of(kWordings)), amount, unit.from, unit.to),
          fmt::format("{} {}", amount * unit.factor, unit.to)};
}

Question day_arithmetic(Chooser& choose) {
  const int today = choose.between(0, 6), shift = choose.between(1, 20);
  const bool ahead = choose.between(0, 1) == 1;
  static const Texts kAhead{"Today is {}. What day is it in {} days?",
                            "If today is {}, which weekday comes {} days later?"};
  static const Texts kBack{"Today is {}. What day was it {} days ago?",
                           "If today is {}, which weekday was {} days earlier?"};
  return {fmt::format("{} {}", kDays[today], ahead ? shift : -shift),
          fmt::format(fmt::runtime(choose.of(ahead ? kAhead : kBack)), kDays[today], shift),
          kDays[(today + (ahead ? shift : 21 - shift)) % 7]};
}

Question count_word(Chooser& choose) {
  const int length = choose.between(4, 8);
  Texts kinds = choose.sample(kColours, 3), words;
  for (int i = 0; i < length; ++i) words.push_back(choose.of(kinds));
  const std::string list = join(words, " ");
  static const Texts kWordings{"How many times does \"{1}\" occur in: {0}", "Count the word \"{1}\" in this list: {0}",
                               "{0}\nHow often is \"{1}\" written above?"};
  return {list + "|" + kinds[0], fmt::format(fmt::runtime(choose.of(kWordings)), list, kinds[0]),
          std::to_string(std::count(words.begin(), words.end(), kinds[0]))};
}

Question comparison(Chooser& choose) {
  Texts order = choose.sample(kNames, 3);  // from most to least
  struct Relation {
    const char *more, *most, *least;
  };
  static const std::array<Relation, 3> kRelations{
      {{"taller", "tallest", "shortest"}, {"older", "oldest", "youngest"}, {"faster", "fastest", "slowest"}}};
  const Relation& relation = kRelations[choose.between(0, 2)];
  Texts facts{fmt::format("{} is {} than {}.", order[0], relation.more, order[1]),
              fmt::format("{} is {} than {}.", order[1], relation.more, order[2])};
  if (choose.between(0, 1)) std::swap(facts[0], facts[1]);
  const bool most = choose.between(0, 1) == 1;
  const std::string word = most ? relation.most : relation.least, text = join(facts, " ");
  static const Texts kWordings{"{} Who is the {}?", "{} Which person is the {}?", "{} Name the {} of them."};
  return {text + "|" + word, fmt::format(fmt::runtime(choose.of(kWordings)), text, word), most ? order[0] : order[2]};
}

Question grammar(Chooser& choose) {
  static const Texts kSymbols{"A", "B", "C", "D"};
  const Texts symbols = choose.sample(kSymbols, 3), values = choose.sample(kWords, 3);
  Texts rules, input, output;
  for (int i = 0; i < 3; ++i) rules.push_back(symbols[i] + " -> " + values[i]);
  for (int i = choose.between(2, 4); i > 0; --i) {
    const int symbol = choose.between(0, 2);
    input.push_back(symbols[symbol]);
    output.push_back(values[symbol]);
  }
  static const Texts kWordings{"Rules: {}. Rewrite: {}", "Apply the rules {} to: {}",
                               "Replace every symbol by its word. {}. Symbols: {}"};
  const std::string rule_text = join(rules, ", "), input_text = join(input, " ");
  return {rule_text + "|" + input_text, fmt::format(fmt::runtime(choose.of(kWordings)), rule_text, input_text),
          join(output, " ")};
}

struct Entry {
  Skill skill;
  Question (*make)(Chooser&);
};

const std::vector<Entry>& entries() {
  static const std::vector<Entry> kEntries{
      {{"reverse_words", "words in reverse order", false}, reverse_words},
      {{"sort_numbers", "numbers in ascending order", false}, sort_numbers},
      {{"maximum", "the largest number of a list", false}, maximum},
      {{"lookup", "a price from a list", false}, lookup},
      {{"unit_conversion", "from one unit to another", false}, unit_conversion},
      {{"day_arithmetic", "weekdays so many days away", false}, day_arithmetic},
      {{"count_word", "how often a word occurs", false}, count_word},
      {{"comparison", "who is the tallest, from two facts", false}, comparison},
      {{"grammar", "symbols rewritten by rules", false}, grammar},
      {{"minimum", "the smallest number of a list", true}, minimum},
      {{"inverse_lookup", "the thing with a given price", true}, inverse_lookup},
  };
  return kEntries;
}

}  // namespace

const std::vector<Skill>& skills() {
  static const std::vector<Skill> kSkills = [] {
    std::vector<Skill> list;
    for (const Entry& entry : entries()) list.push_back(entry.skill);
    return list;
  }();
  return kSkills;
}

std::vector<OrderedJson> generate_skill(const std::string& skill, const std::string& split, int64_t count,
                                        uint64_t seed) {
  auto entry = std::find_if(entries().begin(), entries().end(), [&](const Entry& e) { return e.skill.name == skill; });
  if (entry == entries().end()) {
    std::vector<std::string> names;
    for (const Entry& known : entries()) names.push_back(known.skill.name);
    throw UsageError(fmt::format("unknown skill '{}'; known: {}", skill, fmt::join(names, ", ")));
  }
  MOESAIC_CHECK(split == "train" || split == "test", UsageError, "split is '{}', expected train or test", split);
  MOESAIC_CHECK(!(entry->skill.held_out && split == "train"), UsageError, "skill {} is held out of training", skill);
  Chooser choose(data::hash_text(skill + "/" + split, seed));
  std::vector<OrderedJson> rows;
  std::set<std::string> seen;
  for (int64_t tries = 0; static_cast<int64_t>(rows.size()) < count; ++tries) {
    // Fresh questions become rare only when nearly all have been drawn.
    MOESAIC_CHECK(tries < 200 + 100 * count, UsageError, "skill {} has only about {} {} questions, asked for {}", skill,
                  rows.size(), split, count);
    Question question = entry->make(choose);
    const bool test = data::hash_text(skill + "/" + question.content, kSplitSeed) % kTestShare == 0;
    if (test != (split == "test") || !seen.insert(question.content).second) continue;
    rows.push_back(
        {{"messages",
          {{{"role", "user"}, {"content", question.question}}, {{"role", "assistant"}, {"content", question.answer}}}},
         {"skill", skill},
         {"id", fmt::format("{}-{}-{}", skill, split, rows.size())}});
  }
  return rows;
}

void write_skills(const std::filesystem::path& folder, int64_t train_rows, int64_t test_rows, uint64_t seed) {
  std::vector<std::pair<std::string, std::string>> files;  // names and texts
  OrderedJson info = OrderedJson::object();
  auto add = [&](const std::string& skill, const std::string& split, int64_t count, const std::string& name) {
    std::string text;
    for (const OrderedJson& row : generate_skill(skill, split, count, seed)) text += row.dump() + "\n";
    files.emplace_back(skill + "." + split + ".jsonl", std::move(text));
    info[name] = {{"file_name", files.back().first}, {"formatting", "messages"}};
  };
  for (const Skill& skill : skills()) {
    if (!skill.held_out) add(skill.name, "train", train_rows, skill.name);
    add(skill.name, "test", test_rows, skill.name + "_test");
  }
  files.emplace_back("dataset_info.json", info.dump(2) + "\n");
  std::filesystem::create_directories(folder);
  for (const auto& [name, text] : files) write_new_file(folder / name, text);
}

}  // namespace moesaic::demos
