#include "moesaic/formats/torch_file.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <deque>

#include "moesaic/base/check.h"
#include "moesaic/base/file_errors.h"

namespace moesaic::formats {
namespace {

constexpr size_t kMaxPickleBytes = size_t{16} << 20;
constexpr size_t kMaxDims = 16;

/// Little-endian numbers at checked places of a file.
struct Reader {
  const Bytes& bytes;

  template <class T>
  T number(size_t offset) const {
    check(offset, sizeof(T));
    T value;
    std::memcpy(&value, bytes.data + offset, sizeof(T));
    return value;
  }
  std::string_view text(size_t offset, size_t length) const {
    check(offset, length);
    return bytes.text(offset, length);
  }
  void check(size_t offset, size_t length) const {
    MOESAIC_CHECK(offset <= bytes.size && length <= bytes.size - offset, FormatError,
                  "{}: {} bytes at {} lie outside of the file's {}: it is damaged, or {}", bytes.where, length, offset,
                  bytes.size, ends_early(bytes.size));
  }
};

/// The archive's files: name -> bytes. Stored ones only, as torch.save writes them.
std::map<std::string, std::string_view> zip_entries(const Bytes& bytes) {
  const Reader file{bytes};
  MOESAIC_CHECK(bytes.size >= 4 && file.number<uint32_t>(0) == 0x04034b50, FormatError,
                "{}: is not what torch.save writes since PyTorch 1.6. Save the model as safetensors, or load and save "
                "it again with a newer PyTorch.",
                bytes.where);
  // The end record has 22 bytes and a comment of at most 65535.
  constexpr size_t kEndBytes = 22;
  size_t end = bytes.size < kEndBytes ? 0 : bytes.size - kEndBytes;
  const size_t first = end > 65535 ? end - 65535 : 0;
  while (end > first && file.number<uint32_t>(end) != 0x06054b50) --end;
  MOESAIC_CHECK(end > first, FormatError, "{}: the archive has no end record: {}", bytes.where, ends_early(bytes.size));
  uint64_t count = file.number<uint16_t>(end + 10), at = file.number<uint32_t>(end + 16);
  if (end >= 20 && file.number<uint32_t>(end - 20) == 0x07064b50) {  // zip64
    const auto end64 = file.number<uint64_t>(end - 20 + 8);
    MOESAIC_CHECK(file.number<uint32_t>(end64) == 0x06064b50, FormatError, "{}: the archive's zip64 record is damaged",
                  bytes.where);
    count = file.number<uint64_t>(end64 + 32);
    at = file.number<uint64_t>(end64 + 48);
  }
  std::map<std::string, std::string_view> entries;
  for (uint64_t i = 0; i < count; ++i) {
    MOESAIC_CHECK(file.number<uint32_t>(at) == 0x02014b50, FormatError, "{}: entry {} of the archive is damaged",
                  bytes.where, i);
    const auto flags = file.number<uint16_t>(at + 8), method = file.number<uint16_t>(at + 10);
    uint64_t size = file.number<uint32_t>(at + 24), header = file.number<uint32_t>(at + 42);
    const size_t name_size = file.number<uint16_t>(at + 28), extra_size = file.number<uint16_t>(at + 30);
    const std::string name(file.text(at + 46, name_size));
    MOESAIC_CHECK(method == 0 && (flags & 1) == 0, FormatError,
                  "{}: '{}' is compressed or encrypted, expected it stored as it is", bytes.where, name);
    constexpr uint32_t kFull = 0xffffffff;  // the value stands in the zip64 field, which has those that are full
    for (size_t extra = at + 46 + name_size, stop = extra + extra_size; extra + 4 <= stop;) {
      const size_t length = file.number<uint16_t>(extra + 2);
      if (file.number<uint16_t>(extra) == 1) {
        size_t field = extra + 4;
        if (size == kFull) size = file.number<uint64_t>(field), field += 8;
        if (file.number<uint32_t>(at + 20) == kFull) field += 8;  // the compressed size, which is the same
        if (header == kFull) header = file.number<uint64_t>(field);
      }
      extra += 4 + length;
    }
    MOESAIC_CHECK(file.number<uint32_t>(header) == 0x04034b50, FormatError, "{}: '{}' has no local header", bytes.where,
                  name);
    const size_t data = header + 30 + file.number<uint16_t>(header + 26) + file.number<uint16_t>(header + 28);
    const bool fresh = entries.emplace(name, file.text(data, size)).second;
    MOESAIC_CHECK(fresh, FormatError, "{}: '{}' is there twice", bytes.where, name);
    at += 46 + name_size + extra_size + file.number<uint16_t>(at + 32);
  }
  return entries;
}

struct StorageType {
  const char* name;
  at::ScalarType dtype;
};
constexpr StorageType kStorages[] = {
    {"FloatStorage", at::kFloat},   {"HalfStorage", at::kHalf}, {"BFloat16Storage", at::kBFloat16},
    {"DoubleStorage", at::kDouble}, {"LongStorage", at::kLong}, {"IntStorage", at::kInt},
    {"ShortStorage", at::kShort},   {"CharStorage", at::kChar}, {"ByteStorage", at::kByte},
    {"BoolStorage", at::kBool},
};

/// One value of the pickle. They live in a list and name each other by place, so that none can hold itself.
struct Value {
  enum Kind { kOther, kInt, kText, kTuple, kDict, kGlobal, kStorage, kTensor } kind = kOther;
  int64_t number = 0;
  std::string text;           // of kText and kGlobal ("module name")
  std::vector<size_t> items;  // of kTuple; of kDict key, value, key, value, ...
  at::Tensor tensor;          // kTensor, and kStorage as [n]
};

class Unpickler {
 public:
  Unpickler(const Bytes& bytes, std::map<std::string, std::string_view> entries)
      : bytes_(bytes), entries_(std::move(entries)) {
    for (const auto& [name, content] : entries_) {
      if (name.ends_with("/data.pkl") && name.find('/') == name.size() - 9) prefix_ = name.substr(0, name.size() - 8);
    }
    require(!prefix_.empty(), "has no data.pkl");
    pickle_ = entries_.at(prefix_ + "data.pkl");
    require(pickle_.size() <= kMaxPickleBytes, "data.pkl is larger than 16 MiB");
    if (const auto order = entries_.find(prefix_ + "byteorder"); order != entries_.end()) {
      require(order->second == "little", "was written on a big-endian machine");
    }
  }

  TensorMap run() {
    while (step()) {
    }
    const Value& top = pop();
    require(top.kind == Value::kDict, "does not hold a dict of tensors (a state dict)");
    TensorMap tensors;
    for (size_t i = 0; i < top.items.size(); i += 2) {
      const Value &key = values_[top.items[i]], &value = values_[top.items[i + 1]];
      require(key.kind == Value::kText, "has a key that is no text");
      require(value.kind == Value::kTensor, "'" + key.text.substr(0, 200) + "' is no tensor");
      require(tensors.emplace(key.text, value.tensor).second, "'" + key.text.substr(0, 200) + "' is there twice");
    }
    return tensors;
  }

 private:
  void require(bool ok, const std::string& message) const {
    MOESAIC_CHECK(ok, FormatError, "{}: {}", bytes_.where, message);
  }

  std::string_view take(size_t length) {
    require(length <= pickle_.size() - at_, "data.pkl ends in the middle of a value");
    at_ += length;
    return pickle_.substr(at_ - length, length);
  }
  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
    return value;
  }
  std::string line() {
    const size_t end = pickle_.find('\n', at_);
    require(end != std::string_view::npos, "data.pkl ends in the middle of a name");
    const std::string text(take(end - at_));
    ++at_;
    return text;
  }

  size_t add(Value value) {
    values_.push_back(std::move(value));
    return values_.size() - 1;
  }
  void push(Value value) { stack_.push_back(add(std::move(value))); }
  void push_int(int64_t value) { push({Value::kInt, value, {}, {}, {}}); }
  /// Marks bound what may be taken from the stack.
  size_t pop_place() {
    require(stack_.size() > (marks_.empty() ? 0 : marks_.back()), "data.pkl takes a value that is not there");
    const size_t place = stack_.back();
    stack_.pop_back();
    return place;
  }
  Value& pop() { return values_[pop_place()]; }
  Value& top() {
    require(stack_.size() > (marks_.empty() ? 0 : marks_.back()), "data.pkl uses a value that is not there");
    return values_[stack_.back()];
  }
  /// What was pushed since the last mark.
  std::vector<size_t> pop_marked() {
    require(!marks_.empty(), "data.pkl takes a mark that is not there");
    std::vector<size_t> items(stack_.begin() + static_cast<ptrdiff_t>(marks_.back()), stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return items;
  }
  void push_tuple(std::vector<size_t> items) { push({Value::kTuple, 0, {}, std::move(items), {}}); }
  void push_tuple_of(size_t count) {
    std::vector<size_t> items(count);
    for (size_t i = count; i-- > 0;) items[i] = pop_place();
    push_tuple(std::move(items));
  }
  void set_items(const std::vector<size_t>& items) {
    Value& dict = top();
    require(dict.kind == Value::kDict && items.size() % 2 == 0, "data.pkl sets items of what is no dict");
    dict.items.insert(dict.items.end(), items.begin(), items.end());
  }

  const Value& item(const Value& tuple, size_t i, Value::Kind kind) const {
    require(tuple.kind == Value::kTuple && i < tuple.items.size() && values_[tuple.items[i]].kind == kind,
            "data.pkl describes a tensor in an unknown way");
    return values_[tuple.items[i]];
  }

  /// ('storage', type, file, device, number of elements) -> the file's bytes as a tensor [n].
  Value storage(const Value& id) {
    require(item(id, 0, Value::kText).text == "storage", "data.pkl refers to something that is no storage");
    const std::string& type = item(id, 1, Value::kGlobal).text;
    const auto known = std::find_if(std::begin(kStorages), std::end(kStorages), [&](const StorageType& entry) {
      return type == std::string("torch ") + entry.name;
    });
    require(known != std::end(kStorages), "data.pkl: unknown storage '" + type + "'");
    const std::string key = prefix_ + "data/" + item(id, 2, Value::kText).text;
    const int64_t count = item(id, 4, Value::kInt).number;
    const auto found = entries_.find(key);
    require(found != entries_.end(), "'" + key + "' is missing");
    const std::string_view content = found->second;
    size_t needed = c10::elementSize(known->dtype);
    require(
        count >= 0 && !__builtin_mul_overflow(needed, static_cast<size_t>(count), &needed) && needed == content.size(),
        fmt::format("'{}' has {} bytes, but {} elements of {} are to be there", key, content.size(), count,
                    c10::toString(known->dtype)));
    auto [made, fresh] = storages_.try_emplace({key, known->dtype});
    if (fresh) {
      const auto options = at::TensorOptions().dtype(known->dtype);
      auto* data = const_cast<char*>(content.data());
      if (count == 0 || reinterpret_cast<uintptr_t>(data) % c10::elementSize(known->dtype) != 0) {
        made->second = at::empty({count}, options);
        if (count > 0) std::memcpy(made->second.data_ptr(), data, needed);
      } else {
        made->second = at::from_blob(data, {count}, [owner = bytes_.owner](void*) {}, options);
      }
    }
    return {Value::kStorage, 0, {}, {}, made->second};
  }

  std::vector<int64_t> sizes(const Value& tuple) const {
    require(tuple.items.size() <= kMaxDims, "data.pkl has a tensor of too many dimensions");
    std::vector<int64_t> result;
    for (size_t i = 0; i < tuple.items.size(); ++i) {
      result.push_back(item(tuple, i, Value::kInt).number);
      require(result.back() >= 0, "data.pkl has a tensor of negative size");
    }
    return result;
  }

  /// (storage, offset, sizes, strides, requires_grad, hooks) -> the part of the storage.
  Value tensor(const Value& arguments) const {
    const at::Tensor& storage = item(arguments, 0, Value::kStorage).tensor;
    const int64_t offset = item(arguments, 1, Value::kInt).number;
    const auto shape = sizes(item(arguments, 2, Value::kTuple)), strides = sizes(item(arguments, 3, Value::kTuple));
    bool fits = offset >= 0 && offset <= storage.numel() && shape.size() == strides.size();
    int64_t count = 1, last = offset;  // elements; the place of the last one
    for (size_t d = 0; fits && d < shape.size(); ++d) {
      int64_t reach = 0;
      fits = !__builtin_mul_overflow(count, shape[d], &count) &&
             !__builtin_mul_overflow(std::max<int64_t>(shape[d] - 1, 0), strides[d], &reach) &&
             !__builtin_add_overflow(last, reach, &last);
    }
    // A tensor that reads an element twice could be far larger than the file.
    fits = fits && count <= storage.numel() && (count == 0 || last < storage.numel());
    require(fits, "data.pkl has a tensor that does not fit its storage");
    return {Value::kTensor, 0, {}, {}, storage.as_strided(shape, strides, offset)};
  }

  void reduce() {
    const Value& arguments = pop();
    const Value& callable = pop();
    require(callable.kind == Value::kGlobal && arguments.kind == Value::kTuple, "data.pkl calls what can't be called");
    if (callable.text == "collections OrderedDict") {
      require(arguments.items.empty(), "data.pkl makes an OrderedDict in an unknown way");
      push({Value::kDict, 0, {}, {}, {}});
    } else if (callable.text == "torch._utils _rebuild_tensor_v2") {
      push(tensor(arguments));
    } else if (callable.text == "torch._utils _rebuild_parameter") {
      push({Value::kTensor, 0, {}, {}, item(arguments, 0, Value::kTensor).tensor});
    } else {
      require(false, "data.pkl calls a storage type");
    }
  }

  void global() {
    const std::string module = line(), name = line();
    const std::string whole = module + " " + name;
    const bool storage_type = std::any_of(std::begin(kStorages), std::end(kStorages), [&](const StorageType& entry) {
      return whole == std::string("torch ") + entry.name;
    });
    require(storage_type || whole == "collections OrderedDict" || whole == "torch._utils _rebuild_tensor_v2" ||
                whole == "torch._utils _rebuild_parameter",
            fmt::format("data.pkl names {}.{}, which a file of tensors does not need. Nothing was executed; if you "
                        "trust the file, load it with PyTorch and save its state dict as safetensors.",
                        module.substr(0, 100), name.substr(0, 100)));
    push({Value::kGlobal, 0, whole, {}, {}});
  }

  void remember(size_t index) {
    require(!stack_.empty(), "data.pkl remembers a value that is not there");
    memo_[index] = stack_.back();
  }
  void recall(size_t index) {
    const auto found = memo_.find(index);
    require(found != memo_.end(), "data.pkl recalls a value that was not remembered");
    stack_.push_back(found->second);
  }

  /// One instruction of pickle protocol 2; false at the end.
  bool step() {
    const auto code = static_cast<uint8_t>(take(1)[0]);
    switch (code) {
      case 0x80: require(number<uint8_t>() == 2, "data.pkl: got another pickle protocol than 2"); break;
      case '}': push({Value::kDict, 0, {}, {}, {}}); break;
      case ')': push_tuple({}); break;
      case 'N':
      case 0x88:
      case 0x89: push({}); break;  // None, True, False
      case 'K': push_int(number<uint8_t>()); break;
      case 'M': push_int(number<uint16_t>()); break;
      case 'J': push_int(number<int32_t>()); break;
      case 0x8a: {  // little-endian two's complement of any length
        const std::string_view digits = take(number<uint8_t>());
        require(digits.size() <= 8, "data.pkl has a number of more than 64 bits");
        int64_t value = !digits.empty() && static_cast<int8_t>(digits.back()) < 0 ? -1 : 0;
        std::memcpy(&value, digits.data(), digits.size());
        push_int(value);
        break;
      }
      case 'X': push({Value::kText, 0, std::string(take(number<uint32_t>())), {}, {}}); break;
      case 'q': remember(number<uint8_t>()); break;
      case 'r': remember(number<uint32_t>()); break;
      case 'h': recall(number<uint8_t>()); break;
      case 'j': recall(number<uint32_t>()); break;
      case '(': marks_.push_back(stack_.size()); break;
      case 't': push_tuple(pop_marked()); break;
      case 0x85:
      case 0x86:
      case 0x87: push_tuple_of(code - 0x84); break;
      case 's': {
        const size_t value = pop_place(), key = pop_place();
        set_items({key, value});
        break;
      }
      case 'u': set_items(pop_marked()); break;
      case 'c': global(); break;
      case 'Q': push(storage(pop())); break;
      case 'R': reduce(); break;
      case 'b':
        pop();
        top();
        break;  // a state dict's attributes: versions of modules
      case '.': return false;
      default: require(false, fmt::format("data.pkl: instruction {:#04x} is not one that tensors need", code));
    }
    return true;
  }

  const Bytes& bytes_;
  std::map<std::string, std::string_view> entries_;
  std::string prefix_;  // "archive/"
  std::string_view pickle_;
  size_t at_ = 0;
  std::deque<Value> values_;
  std::vector<size_t> stack_, marks_;
  std::map<size_t, size_t> memo_;
  std::map<std::pair<std::string, at::ScalarType>, at::Tensor> storages_;
};

}  // namespace

TensorMap read_torch_file(const std::filesystem::path& path) { return read_torch_file(Bytes::map(path)); }

TensorMap read_torch_file(const Bytes& bytes) { return Unpickler(bytes, zip_entries(bytes)).run(); }

}  // namespace moesaic::formats
