// Strict JSON (RFC 8259): no comments, no trailing commas, no key twice, valid UTF-8. Numbers keep their spelling.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace attncompile::json {

enum class Kind { null, boolean, number, string, array, object };

class Value {
 public:
  Kind kind = Kind::null;
  std::string text;  // of a string; the spelling of a number, true or false
  std::vector<Value> items;
  std::vector<std::pair<std::string, Value>> members;

  // These throw Error, naming `where`, if the value is of another kind.
  const Value* find(std::string_view key) const;
  const Value& at(std::string_view key, const std::string& where) const;
  const std::string& string(std::string_view key, const std::string& where) const;
  std::int64_t integer(std::string_view key, const std::string& where, std::int64_t least, std::int64_t most) const;
  bool boolean(std::string_view key, const std::string& where) const;
  const std::vector<Value>& array(std::string_view key, const std::string& where) const;
  const Value& object(std::string_view key, const std::string& where) const;
};

// Throws Error saying what is wrong at which byte.
Value parse(std::string_view text);

// Keys sorted, no spaces, nothing escaped that need not be: what Python's json.dumps(value, sort_keys=True,
// separators=(",", ":"), ensure_ascii=False) gives.
std::string canonical(const Value& value);

}  // namespace attncompile::json
