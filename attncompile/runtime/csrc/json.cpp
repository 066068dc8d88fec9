#include "json.h"

#include <algorithm>
#include <charconv>

#include "error.h"

namespace attncompile::json {
namespace {

constexpr int kDeepest = 64;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Value whole() {
    Value found = value(0);
    space();
    if (place_ != text_.size()) fail("something follows the value");
    return found;
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw Error("no JSON at byte " + std::to_string(place_) + ": " + what, "");
  }

  bool more() const { return place_ < text_.size(); }
  char peek() const { return more() ? text_[place_] : '\0'; }
  void space() {
    while (more() && (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t')) ++place_;
  }
  void expect(char wanted, const char* what) {
    if (!more() || peek() != wanted) fail(what);
    ++place_;
  }
  bool word(std::string_view wanted) {
    if (text_.substr(place_, wanted.size()) != wanted) return false;
    place_ += wanted.size();
    return true;
  }

  Value value(int depth) {
    if (depth > kDeepest) fail("it is nested too deep");
    space();
    if (!more()) fail("it ends too early");
    Value found;
    switch (peek()) {
      case '{': object(found, depth); break;
      case '[': array(found, depth); break;
      case '"': found.kind = Kind::string; found.text = string(); break;
      default: scalar(found);
    }
    return found;
  }

  void scalar(Value& found) {
    if (word("null")) return;
    for (std::string_view name : {"true", "false"})
      if (word(name)) {
        found.kind = Kind::boolean;
        found.text = name;
        return;
      }
    found.kind = Kind::number;
    const std::size_t start = place_;
    if (peek() == '-') ++place_;
    if (peek() == '0') ++place_;
    else digits();
    if (peek() == '.') { ++place_; digits(); }
    if (peek() == 'e' || peek() == 'E') {
      ++place_;
      if (peek() == '+' || peek() == '-') ++place_;
      digits();
    }
    found.text = text_.substr(start, place_ - start);
  }

  void digits() {
    const std::size_t start = place_;
    while (more() && peek() >= '0' && peek() <= '9') ++place_;
    if (place_ == start) fail("a value was expected");
  }

  void array(Value& found, int depth) {
    found.kind = Kind::array;
    ++place_;
    space();
    if (peek() == ']') { ++place_; return; }
    while (true) {
      found.items.push_back(value(depth + 1));
      space();
      if (peek() == ',') { ++place_; continue; }
      expect(']', "']' or ',' was expected");
      return;
    }
  }

  void object(Value& found, int depth) {
    found.kind = Kind::object;
    ++place_;
    space();
    if (peek() == '}') { ++place_; return; }
    while (true) {
      space();
      if (peek() != '"') fail("a key was expected");
      std::string key = string();
      if (found.find(key) != nullptr) fail("a key is there twice");
      space();
      expect(':', "':' was expected");
      Value inner = value(depth + 1);
      found.members.emplace_back(std::move(key), std::move(inner));
      space();
      if (peek() == ',') { ++place_; continue; }
      expect('}', "'}' or ',' was expected");
      return;
    }
  }

  unsigned hex() {
    unsigned found = 0;
    for (int i = 0; i < 4; ++i, ++place_) {
      const char c = peek();
      found *= 16;
      if (c >= '0' && c <= '9') found += static_cast<unsigned>(c - '0');
      else if (c >= 'a' && c <= 'f') found += static_cast<unsigned>(c - 'a' + 10);
      else if (c >= 'A' && c <= 'F') found += static_cast<unsigned>(c - 'A' + 10);
      else fail("four hexadecimal digits were expected");
    }
    return found;
  }

  void escape(std::string& out) {
    ++place_;
    const char c = peek();
    ++place_;
    switch (c) {
      case '"': case '\\': case '/': out += c; return;
      case 'b': out += '\b'; return;
      case 'f': out += '\f'; return;
      case 'n': out += '\n'; return;
      case 'r': out += '\r'; return;
      case 't': out += '\t'; return;
      case 'u': break;
      default: fail("an unknown escape");
    }
    unsigned code = hex();
    if (code >= 0xD800 && code < 0xDC00) {
      if (!word("\\u")) fail("half of a surrogate pair");
      const unsigned low = hex();
      if (low < 0xDC00 || low > 0xDFFF) fail("half of a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code <= 0xDFFF) {
      fail("half of a surrogate pair");
    }
    utf8(out, code);
  }

  static void utf8(std::string& out, unsigned code) {
    const auto byte = [&out](unsigned bits) { out += static_cast<char>(static_cast<unsigned char>(bits)); };
    if (code < 0x80) { byte(code); return; }
    if (code < 0x800) { byte(0xC0 | code >> 6); byte(0x80 | (code & 63)); return; }
    if (code < 0x10000) byte(0xE0 | code >> 12);
    else { byte(0xF0 | code >> 18); byte(0x80 | (code >> 12 & 63)); }
    byte(0x80 | (code >> 6 & 63));
    byte(0x80 | (code & 63));
  }

  std::string string() {
    ++place_;
    std::string out;
    while (true) {
      if (!more()) fail("a string does not end");
      const unsigned char c = static_cast<unsigned char>(peek());
      if (c == '"') { ++place_; return out; }
      if (c == '\\') { escape(out); continue; }
      if (c < 0x20) fail("a control character in a string");
      const std::size_t length = sequence();
      out += text_.substr(place_, length);
      place_ += length;
    }
  }

  // Length of the UTF-8 sequence here.
  std::size_t sequence() const {
    const auto byte = [this](std::size_t i) {
      return place_ + i < text_.size() ? static_cast<unsigned char>(text_[place_ + i]) : static_cast<unsigned char>(0);
    };
    const unsigned first = byte(0);
    if (first < 0x80) return 1;
    const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
    if (first < 0xC2 || first > 0xF4) fail("no UTF-8");
    for (std::size_t i = 1; i < length; ++i)
      if ((byte(i) & 0xC0) != 0x80) fail("no UTF-8");
    const unsigned second = byte(1);
    const bool wrong = (first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F) ||
                       (first == 0xF0 && second < 0x90) || (first == 0xF4 && second > 0x8F);
    if (wrong) fail("no UTF-8");
    return length;
  }

  std::string_view text_;
  std::size_t place_ = 0;
};

[[noreturn]] void wrong(std::string_view key, const std::string& where, const char* what) {
  throw Error(where + ": '" + std::string(key) + "' is " + what, "");
}

void quoted(std::string& out, const std::string& text) {
  static const char* const hex = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    switch (c) {
      case '"': out += "\\\""; break;
      case '\\': out += "\\\\"; break;
      case '\n': out += "\\n"; break;
      case '\r': out += "\\r"; break;
      case '\t': out += "\\t"; break;
      case '\f': out += "\\f"; break;
      case '\b': out += "\\b"; break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out += "\\u00";
          out += hex[static_cast<unsigned char>(c) >> 4];
          out += hex[static_cast<unsigned char>(c) & 15];
        } else {
          out += c;
        }
    }
  }
  out += '"';
}

void write(std::string& out, const Value& value) {
  switch (value.kind) {
    case Kind::null: out += "null"; return;
    case Kind::boolean: case Kind::number: out += value.text; return;
    case Kind::string: quoted(out, value.text); return;
    case Kind::array:
      out += '[';
      for (std::size_t i = 0; i < value.items.size(); ++i) {
        if (i) out += ',';
        write(out, value.items[i]);
      }
      out += ']';
      return;
    case Kind::object: break;
  }
  std::vector<const std::pair<std::string, Value>*> sorted;
  for (const auto& member : value.members) sorted.push_back(&member);
  // Bytes of UTF-8 sort as code points do.
  std::sort(sorted.begin(), sorted.end(), [](auto* a, auto* b) { return a->first < b->first; });
  out += '{';
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    if (i) out += ',';
    quoted(out, sorted[i]->first);
    out += ':';
    write(out, sorted[i]->second);
  }
  out += '}';
}

}  // namespace

const Value* Value::find(std::string_view key) const {
  for (const auto& member : members)
    if (member.first == key) return &member.second;
  return nullptr;
}

const Value& Value::at(std::string_view key, const std::string& where) const {
  if (kind != Kind::object) throw Error(where + " is no object", "");
  const Value* found = find(key);
  if (found == nullptr) wrong(key, where, "missing");
  return *found;
}

const std::string& Value::string(std::string_view key, const std::string& where) const {
  const Value& found = at(key, where);
  if (found.kind != Kind::string) wrong(key, where, "no string");
  return found.text;
}

std::int64_t Value::integer(std::string_view key, const std::string& where, std::int64_t least,
                            std::int64_t most) const {
  const Value& found = at(key, where);
  std::int64_t number = 0;
  const char* end = found.text.data() + found.text.size();
  const auto read = std::from_chars(found.text.data(), end, number);
  if (found.kind != Kind::number || read.ec != std::errc() || read.ptr != end) wrong(key, where, "no integer");
  if (number < least || number > most) wrong(key, where, "out of range");
  return number;
}

bool Value::boolean(std::string_view key, const std::string& where) const {
  const Value& found = at(key, where);
  if (found.kind != Kind::boolean) wrong(key, where, "neither true nor false");
  return found.text == "true";
}

const std::vector<Value>& Value::array(std::string_view key, const std::string& where) const {
  const Value& found = at(key, where);
  if (found.kind != Kind::array) wrong(key, where, "no array");
  return found.items;
}

const Value& Value::object(std::string_view key, const std::string& where) const {
  const Value& found = at(key, where);
  if (found.kind != Kind::object) wrong(key, where, "no object");
  return found;
}

Value parse(std::string_view text) { return Parser(text).whole(); }

std::string canonical(const Value& value) {
  std::string out;
  write(out, value);
  return out;
}

}  // namespace attncompile::json
