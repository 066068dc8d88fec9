// The language of launch arguments (docs/kernels.md), read once into a flat program and evaluated without allocating.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace attncompile {

// The slot of a symbol, or a negative number where there is none.
using Slot = std::function<int(const std::string& name)>;

class Program {
 public:
  // Throws Error: `text` is not in the language, or `slot` does not know a symbol (which `known` lists).
  static Program compile(std::string_view text, const Slot& slot, const std::string& known = "");

  // What went wrong, in plain values: a program that fails allocates only when this is made into an Error.
  struct Failure {
    enum Kind { none, division, overflow, absent } kind = none;
    std::int64_t left = 0, right = 0;
    int slot = -1;
    char sign = 0;
  };

  // `values` by slot; `known` says of each slot whether it has a value (nullptr: all have one).
  Failure evaluate(const std::int64_t* values, const bool* known, std::int64_t* out) const noexcept;

  // The error for a failure of this program.
  [[noreturn]] void raise(const Failure& failure, const std::function<std::string(int)>& name) const;

  const std::string& text() const { return text_; }

 private:
  friend class Reader;
  enum class Op : unsigned char { literal, symbol, add, subtract, multiply, divide, divide_up, smaller, larger };
  struct Step {
    Op op;
    std::int64_t value;
  };

  std::string text_;
  std::vector<Step> steps_;
};

}  // namespace attncompile
