#include "moesaic/tokenizer/learnt_spans.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string_view>

#include "moesaic/tokenizer/unicode.h"

namespace moesaic::tokenizer {
namespace {

// Signs are Unicode's noncharacters U+FDD0 to U+FDEF, which no text holds: the digits of a message's number in base 16,
// then one that says what the words are. The bridge writes the last two around {% generation %} blocks.
constexpr std::string_view kSignLead = "\xEF\xB7";
constexpr unsigned char kFirstDigit = 0x90, kContent = 0xA0, kCall = 0xA1, kName = 0xA2, kBlockBegin = 0xAE,
                        kBlockEnd = 0xAF;

std::string sign_of(size_t message, unsigned char kind) {
  std::string digits;
  do {
    digits = std::string(kSignLead) + static_cast<char>(kFirstDigit + message % 16) + digits;
    message /= 16;
  } while (message > 0);
  return digits + std::string(kSignLead) + static_cast<char>(kind);
}

/// True when a sign's byte stands at text[at].
bool is_sign(std::string_view text, size_t at) {
  return at + 2 < text.size() && text.substr(at, 2) == kSignLead && static_cast<unsigned char>(text[at + 2]) >= 0x90 &&
         static_cast<unsigned char>(text[at + 2]) <= kBlockEnd;
}

/// Bytes of the tag that `text` begins with, <think> or [THINK]; 0 when it begins with none.
size_t leading_tag(std::string_view text) {
  constexpr size_t kLongest = 64;
  if (text.empty() || (text[0] != '<' && text[0] != '[')) return 0;
  const char close = text[0] == '<' ? '>' : ']';
  for (size_t i = 1; i < std::min(text.size(), kLongest); ++i) {
    if (text[i] == close) return i > 1 ? i + 1 : 0;
    const bool capital = (text[i] >= 'A' && text[i] <= 'Z') || text[i] == '_' || text[i] == '/';
    if (text[i] == text[0] || leading_space(text.substr(i)) > 0 || (close == ']' && !capital)) return 0;
  }
  return 0;
}

/// `text` with a sign at both ends of every run of words, and behind a tag that it ends in. Other tags and the blanks
/// around a run stay as they are: templates look for the one and strip the other.
std::string with_signs(std::string_view text, const std::string& sign) {
  std::string out;
  size_t run = 0, end = 0;         // the run's first byte, and the one behind its last word
  std::optional<size_t> last_tag;  // where in `out` one ends behind which no word stands
  auto close = [&](size_t next) {
    if (end > run) {
      out += sign;
      out += text.substr(run, end - run);
      out += sign;
      run = end;
      last_tag.reset();
    }
    out += text.substr(run, next - run);
  };
  for (size_t at = 0; at < text.size();) {
    if (const size_t tag = leading_tag(text.substr(at))) {
      close(at);
      out += text.substr(at, tag);
      last_tag = out.size();
      run = end = at += tag;
    } else if (const size_t blank = leading_space(text.substr(at))) {
      if (end <= run) {
        out += text.substr(at, blank);
        run = end = at + blank;
      }
      at += blank;
    } else {
      end = ++at;
    }
  }
  close(text.size());
  if (last_tag) out.insert(*last_tag, sign);
  return out;
}

/// Puts signs into every text of `value`; false when it holds none.
bool sign_values(OrderedJson& value, const std::string& sign) {
  if (value.is_string()) {
    const std::string text = with_signs(value.get_ref<const std::string&>(), sign);
    const bool any = text != value.get_ref<const std::string&>();
    value = text;
    return any;
  }
  bool any = false;
  if (value.is_structured()) {
    for (OrderedJson& part : value) any = sign_values(part, sign) || any;
  }
  return any;
}

/// Puts signs into the keys of an object; false when it has none.
bool sign_keys(OrderedJson& object, const std::string& sign) {
  if (!object.is_object() || object.empty()) return false;
  OrderedJson out = OrderedJson::object();
  for (const auto& [key, value] : object.items()) out[with_signs(key, sign)] = value;
  object = std::move(out);
  return true;
}

/// Puts signs into the string literals of JSON text, so that it says the same as text and as an object; false when it
/// has none.
bool sign_literals(OrderedJson& value, const std::string& sign) {
  const std::string text = value.get<std::string>();
  std::string out;
  for (size_t at = 0; at < text.size();) {
    out += text[at];
    if (text[at++] != '"') continue;
    size_t end = at;
    while (end < text.size() && text[end] != '"') end += text[end] == '\\' ? 2 : 1;
    end = std::min(end, text.size());
    out += with_signs(std::string_view(text).substr(at, end - at), sign);
    if (end < text.size()) out += '"';
    at = end + 1;
  }
  value = out;
  return out != text;
}

bool sign_arguments(OrderedJson& arguments, const std::string& sign) {
  if (arguments.is_string()) return sign_literals(arguments, sign);
  return sign_values(arguments, sign) || sign_keys(arguments, sign);
}

/// What a message without words gets: an answer has an end of turn all the same, a question stands between two answers.
enum class Wordless { kSignBehindBlanks, kSign, kNothing };

/// The messages with signs in whatever they say. Roles, ids and names steer templates and stay as they are.
OrderedJson signed_messages(const OrderedJson& messages, Wordless wordless) {
  OrderedJson out = messages;
  for (size_t i = 0; i < out.size(); ++i) {
    OrderedJson& message = out[i];
    if (!message.is_object()) continue;
    const std::string role = message.value("role", "");
    if (role == "system" || role == "developer") continue;
    bool any = false;
    for (const char* key : {"content", "reasoning_content", "thinking", "reasoning"}) {
      if (message.contains(key)) any = sign_values(message[key], sign_of(i, kContent)) || any;
    }
    if (message.contains("tool_calls") && message["tool_calls"].is_array()) {
      for (OrderedJson& call : message["tool_calls"]) {
        if (!call.is_object()) continue;
        OrderedJson& function = call.contains("function") ? call["function"] : call;
        if (!function.is_object()) continue;
        const std::string sign = sign_of(i, kCall);
        if (function.contains("arguments")) any = sign_arguments(function["arguments"], sign) || any;
        // Results may name the call again, so names are signed only where nothing else can be.
        if (!any && function.contains("name")) any = sign_values(function["name"], sign_of(i, kName));
      }
    }
    if (any || wordless == Wordless::kNothing || !message.contains("content")) continue;
    const bool blanks = wordless == Wordless::kSignBehindBlanks && message["content"].is_string();
    message["content"] = (blanks ? message["content"].get<std::string>() : "") + sign_of(i, kContent);
  }
  return out;
}

/// Where a stretch of a message's words stands in a text.
struct Words {
  size_t begin = 0, end = 0;      // of the first and the last of them
  unsigned char kind = kContent;  // of the last of them
};

/// A text without its signs, and what they said.
struct Shown {
  std::string text;
  std::map<size_t, std::vector<Words>> words;     // by message; of several stretches others' words stand between them
  std::vector<std::pair<size_t, size_t>> blocks;  // {% generation %}
  size_t last = 0;                                // the end of the last words of any message

  explicit Shown(std::string_view with_signs) {
    size_t message = 0;
    std::vector<size_t> open;
    for (size_t at = 0; at < with_signs.size();) {
      if (!is_sign(with_signs, at)) {
        text += with_signs[at++];
        continue;
      }
      const auto sign = static_cast<unsigned char>(with_signs[at + 2]);
      at += 3;
      if (sign < kContent) {
        message = message * 16 + (sign - kFirstDigit);
      } else if (sign == kBlockBegin) {
        open.push_back(text.size());
      } else if (sign == kBlockEnd) {
        if (open.empty()) continue;
        blocks.emplace_back(open.back(), text.size());
        open.pop_back();
      } else {
        add(std::exchange(message, 0), sign);
      }
    }
    std::sort(blocks.begin(), blocks.end());
  }

 private:
  void add(size_t message, unsigned char kind) {
    std::vector<Words>& stretches = words[message];
    // Named again, by its result.
    if (kind == kName && !stretches.empty() && stretches.back().end > stretches.back().begin) return;
    if (stretches.empty() || speaker_ != message) stretches.push_back({text.size(), text.size(), kind});
    stretches.back().end = last = text.size();
    stretches.back().kind = kind;
    speaker_ = message;
  }

  size_t speaker_ = 0;  // whose words were the last
};

/// Bytes at the start that are alike, up to a whole character.
size_t common_prefix(std::string_view a, std::string_view b) {
  size_t size = std::mismatch(a.begin(), a.begin() + std::min(a.size(), b.size()), b.begin()).first - a.begin();
  while (size > 0 && size < a.size() && (static_cast<unsigned char>(a[size]) & 0xC0) == 0x80) --size;
  return size;
}

std::string_view without_blanks_behind(std::string_view text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.remove_suffix(1);
  return text;
}

/// Finds the turns of one conversation.
class Turns {
 public:
  Turns(const std::string& text, const OrderedJson& messages, const std::vector<bool>& learnt,
        const std::vector<std::string>& special_texts, const RenderSigned& render)
      : text_(text),
        messages_(messages),
        roles_(messages.size()),
        learnt_(learnt),
        special_texts_(special_texts),
        render_(render),
        signed_(signed_messages(messages, Wordless::kSignBehindBlanks)),
        shown_(render(signed_, false, true)) {
    for (size_t i = 0; i < messages.size(); ++i) roles_[i] = messages[i].value("role", "");
    // A template may strip blanks, or leave empty answers out.
    for (const Wordless wordless : {Wordless::kSign, Wordless::kNothing}) {
      if (shown_.text == text_) break;
      signed_ = signed_messages(messages, wordless);
      shown_ = Shown(render(signed_, false, true));
    }
    MOESAIC_CHECK(shown_.text == text_, DataError,
                  "chat template: cannot tell which part of the rendered conversation is whose: the template writes "
                  "words otherwise when signs stand around them. Put {{% generation %}} blocks into a template of your "
                  "own and name it with the key `template`.");
    for (const auto& [message, stretches] : shown_.words) {
      for (const Words& words : stretches) {
        begins_.emplace(words.begin, message);
        ends_.emplace(words.end, message);
      }
    }
  }

  std::vector<std::pair<size_t, size_t>> spans() {
    if (!shown_.blocks.empty()) return blocks();
    std::vector<std::pair<size_t, size_t>> spans;
    for (size_t i = 0; i < learnt_.size(); ++i) {
      if (!learnt_[i]) continue;
      const auto words = shown_.words.find(i);
      if (words == shown_.words.end() && signed_[i] == messages_[i]) continue;  // it says nothing
      MOESAIC_CHECK(words != shown_.words.end(), DataError,
                    "chat template: cannot tell which part of the rendered conversation is message {}: the template "
                    "does not show it. Set \"train\": false on it, or use another template.",
                    i);
      for (const Words& stretch : words->second) {
        const bool first = &stretch == &words->second.front(), last = &stretch == &words->second.back();
        const size_t begin = first ? begin_of(i, stretch) : begin_again(i, stretch);
        const size_t end = end_of(i, stretch, first, last);
        if (end > begin) spans.emplace_back(begin, end);
      }
    }
    std::sort(spans.begin(), spans.end());
    return spans;
  }

 private:
  /// The {% generation %} blocks, without those that hold words of other messages only.
  std::vector<std::pair<size_t, size_t>> blocks() const {
    std::vector<std::pair<size_t, size_t>> kept;
    for (const auto& [begin, end] : shown_.blocks) {
      bool own = false, other = false;
      for (auto at = begins_.lower_bound({begin, 0}); at != begins_.end() && at->first <= end; ++at) {
        const std::vector<Words>& stretches = shown_.words.at(at->second);
        const bool whole = std::any_of(stretches.begin(), stretches.end(), [&](const Words& words) {
          return words.begin == at->first && words.end <= end;
        });
        if (whole) (learnt_[at->second] ? own : other) = true;
      }
      if (end > begin && (own || !other)) kept.emplace_back(begin, end);
    }
    return kept;
  }

  /// What a conversation of the first `count` messages ends in, behind the words of its last message; nullopt when the
  /// template refuses it.
  const std::optional<std::string>& tail(size_t count, bool prompt) {
    const auto [place, missing] = tails_.try_emplace({count, prompt});
    if (missing) {
      try {
        const OrderedJson first(OrderedJson::array_t(signed_.begin(), signed_.begin() + static_cast<ptrdiff_t>(count)));
        const Shown shown(render_(first, prompt, false));
        place->second = shown.text.substr(shown.last);
      } catch (const DataError&) {
      }
    }
    return place->second;
  }

  /// What stands behind the calls of a message whose content the template writes behind their results.
  const std::optional<std::string>& tail_of_calls() {
    if (tail_of_calls_) return *tail_of_calls_;
    tail_of_calls_.emplace();
    size_t k = learnt_.size() - 1;
    while (!learnt_[k] || !shown_.words.contains(k) || shown_.words.at(k).size() < 2) --k;
    OrderedJson first(OrderedJson::array_t(signed_.begin(), signed_.begin() + static_cast<ptrdiff_t>(k) + 1));
    first[k]["content"] = "";
    try {
      const Shown shown(render_(first, false, false));
      *tail_of_calls_ = shown.text.substr(shown.last);
    } catch (const DataError&) {
    }
    return *tail_of_calls_;
  }

  /// The last learnt turn that follows a message of the same role as message i does, one with words if that has some.
  size_t like_begin(size_t i) const {
    for (size_t k = learnt_.size(); i > 0 && k-- > i;) {
      const bool alike = roles_[k - 1] == roles_[i - 1] && shown_.words.contains(k - 1) == shown_.words.contains(i - 1);
      if (learnt_[k] && alike) return k;
    }
    return i;
  }

  /// The last learnt turn that ends in words of this kind.
  size_t like_end(size_t i, unsigned char kind) const {
    for (size_t k = learnt_.size(); k-- > i;) {
      const auto words = shown_.words.find(k);
      if (learnt_[k] && words != shown_.words.end() && words->second.back().kind == kind) return k;
    }
    return i;
  }

  /// What stands in front of an answer without a thought to the first `count` messages, behind their words.
  std::string ahead_of_plain(size_t count) {
    OrderedJson messages(OrderedJson::array_t(signed_.begin(), signed_.begin() + static_cast<ptrdiff_t>(count)));
    messages.push_back({{"role", roles_[count]}, {"content", sign_of(count, kContent)}});
    try {
      const Shown shown(render_(messages, false, false));
      const auto words = shown.words.find(count);
      if (words == shown.words.end()) return "";
      size_t from = 0;
      for (const auto& [message, stretches] : shown.words) {
        if (message != count) from = std::max(from, stretches.back().end);
      }
      const size_t to = words->second.front().begin;
      return from < to ? shown.text.substr(from, to - from) : "";
    } catch (const DataError&) {
      return "";
    }
  }

  /// What the template adds for the generation prompt alone, behind the first `count` messages.
  std::string generation_prompt(size_t count) {
    const auto &with = tail(count, true), &without = tail(count, false);
    return with && without && with->starts_with(*without) ? with->substr(without->size()) : std::string();
  }

  /// Where the words of another message end in front of `at`, and where others begin behind it.
  size_t end_before(size_t at, size_t i) const {
    auto before = ends_.upper_bound({at, learnt_.size()});
    if (before != ends_.begin() && std::prev(before)->second == i) --before;
    return before == ends_.begin() ? 0 : std::prev(before)->first;
  }
  size_t begin_behind(size_t at, size_t i) const {
    auto behind = begins_.lower_bound({at, 0});
    if (behind != begins_.end() && behind->second == i) ++behind;
    return behind == begins_.end() ? text_.size() : behind->first;
  }

  /// The end of the generation prompt.
  size_t begin_of(size_t i, const Words& words) {
    const size_t from = end_before(words.begin, i);
    const std::string_view ahead = std::string_view(text_).substr(from, words.begin - from);
    const size_t like = like_begin(i);
    const auto& expected = tail(like, true);
    size_t alike = expected ? common_prefix(ahead, *expected) : 0;
    if (expected && alike == expected->size()) return from + alike;
    // A prompt that holds an empty thought begins as a thought of the model's own does.
    if (alike > 0 && !without_blanks_behind(std::string_view(*expected).substr(alike)).empty()) {
      alike = std::min(alike, common_prefix(ahead, ahead_of_plain(like)));
    }
    // The message in front may end in a tag, which has no sign.
    if (const size_t at = expected ? ahead.rfind(*expected) : std::string_view::npos; at != std::string_view::npos) {
      return from + at + expected->size();
    }
    // Something else may stand in front of the generation prompt.
    const std::string header = generation_prompt(like);
    if (const size_t at = header.empty() ? std::string_view::npos : ahead.rfind(header); at != std::string_view::npos) {
      return from + at + header.size();
    }
    // Where there is none, what stands in front depends on the blanks of the message before.
    if (header.empty()) {
      const auto& own = tail(i, true);
      const size_t at = own ? ahead.rfind(*own) : std::string_view::npos;
      if (at != std::string_view::npos) return from + at + own->size();
    }
    // Or the turn lacks the end of what a prompt has, as earlier turns lack <think>.
    size_t at = 0, size = alike;
    for (size_t p = 0; p < ahead.size() && alike == 0; ++p) {
      if (const size_t n = common_prefix(ahead.substr(p), header); n > 0 && n >= size) size = n, at = p;
    }
    if (at + size < ahead.size()) size = whole(ahead.substr(at), size);
    MOESAIC_CHECK(size > 0 || ahead.empty(), DataError,
                  "chat template: cannot tell where message {} begins: no generation prompt stands in front of it. Set "
                  "\"train\": false on it, or use another template.",
                  i);
    return from + at + size;
  }

  /// Where a message goes on behind words of others, results of its calls say: behind the last special token there.
  size_t begin_again(size_t i, const Words& words) const {
    const size_t from = end_before(words.begin, i);
    const std::string_view ahead = std::string_view(text_).substr(from, words.begin - from);
    size_t behind = 0;
    for (auto [at, size] = next_special(ahead, 0); size > 0; std::tie(at, size) = next_special(ahead, behind)) {
      behind = at + size;
    }
    return behind > 0 ? from + behind : words.begin;
  }

  /// The end of the end-of-turn token, or of what stands for it, behind the message's first or last stretch of words.
  size_t end_of(size_t i, const Words& words, bool first_stretch, bool last_stretch) {
    const bool last = i + 1 == learnt_.size();
    const size_t stop = last ? text_.size() : begin_behind(words.end, i);
    const std::string_view behind = std::string_view(text_).substr(words.end, stop - words.end);
    if (last) return words.end + closed(behind);
    const auto& expected = last_stretch ? tail(like_end(i, words.kind) + 1, false) : tail_of_calls();
    const std::string_view closing = expected ? without_blanks_behind(*expected) : std::string_view();
    const auto token = std::find_if(special_texts_.begin(), special_texts_.end(),
                                    [&](const std::string& text) { return closing.ends_with(text); });
    if (token != special_texts_.end()) {
      if (const size_t at = behind.find(*token); at != std::string_view::npos) return words.end + at + token->size();
      // The conversation's last turn may end in a token of its own; the next turn's header begins with another.
      const auto [first, size] = next_special(behind, 0);
      const bool others = next_special(behind, first + size).second > 0;
      if (size > 0 && (others || !first_stretch)) return words.end + first + size;
    }
    size_t alike = expected ? common_prefix(behind, *expected) : 0;
    if (!expected || alike < expected->size()) {
      const auto& own = tail(i + 1, false);
      alike = own ? common_prefix(behind, *own) : 0;
      if (own && alike < own->size()) alike = whole(behind, alike);
    }
    return words.end + closed(behind.substr(0, alike));
  }

  /// The largest size up to `size` at which no word or tag of `text` is cut.
  static size_t whole(std::string_view text, size_t size) {
    while (size > 0 && std::string_view("\n >]").find(text[size - 1]) == std::string_view::npos) --size;
    return size;
  }

  /// Place and size of the first special token of `text` at or behind `from`; size 0 when there is none.
  std::pair<size_t, size_t> next_special(std::string_view text, size_t from) const {
    std::pair<size_t, size_t> first{text.size(), 0};
    for (const std::string& token : special_texts_) {
      const size_t at = text.find(token, from);
      if (at < first.first || (at == first.first && token.size() > first.second)) first = {at, token.size()};
    }
    return first;
  }

  /// Blanks a template writes behind the end-of-turn token are not the assistant's: generation stops before them.
  size_t closed(std::string_view behind) const {
    const std::string_view turn = without_blanks_behind(behind);
    const bool token = std::any_of(special_texts_.begin(), special_texts_.end(),
                                   [&](const std::string& text) { return turn.ends_with(text); });
    return token ? turn.size() : behind.size();
  }

  const std::string& text_;
  const OrderedJson& messages_;
  std::vector<std::string> roles_;
  const std::vector<bool>& learnt_;
  const std::vector<std::string>& special_texts_;
  const RenderSigned& render_;
  OrderedJson signed_;
  Shown shown_;
  std::set<std::pair<size_t, size_t>> begins_, ends_;  // of all messages' words, with the message
  std::map<std::pair<size_t, bool>, std::optional<std::string>> tails_;
  std::optional<std::optional<std::string>> tail_of_calls_;  // once asked for
};

}  // namespace

std::vector<std::pair<size_t, size_t>> learnt_spans(const std::string& text, const OrderedJson& messages,
                                                    const std::vector<bool>& learnt,
                                                    const std::vector<std::string>& special_texts,
                                                    const RenderSigned& render) {
  for (size_t at = text.find(kSignLead); at != std::string::npos; at = text.find(kSignLead, at + 1)) {
    MOESAIC_CHECK(!is_sign(text, at), DataError,
                  "chat template: the conversation holds one of the noncharacters U+FDD0 to U+FDEF, expected none");
  }
  if (std::find(learnt.begin(), learnt.end(), true) == learnt.end()) return {};
  return Turns(text, messages, learnt, special_texts, render).spans();
}

}  // namespace moesaic::tokenizer
