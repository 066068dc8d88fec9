#include "expression.h"

#include <charconv>
#include <utility>

#include "error.h"

namespace attncompile {
namespace {

constexpr std::size_t kLongest = 4000;
constexpr int kDeepest = 100;   // operators and calls above a leaf, as in expressions.py
constexpr int kBrackets = 200;  // of parentheses alone
constexpr std::size_t kStack = 128;

bool begins_name(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

// Recursive descent that writes the program in postfix order. Each function returns the height of what it read.
class Reader {
 public:
  Reader(std::string_view text, const Slot& slot, const std::string& known, Program& out)
      : text_(text), slot_(slot), known_(known), out_(out) {}

  void whole() {
    if (text_.size() > kLongest) fail("it is longer than 4000 characters");
    const int height = expression();
    space();
    if (place_ != text_.size()) fail("it cannot be read");
    if (height > kDeepest) fail("it is nested more than 100 deep");
    if (largest_ > kStack) fail("it is nested too deep");
  }

 private:
  using Op = Program::Op;

  [[noreturn]] void fail(const std::string& reason) const {
    std::string shown(text_.substr(0, 57));
    if (text_.size() > 60) shown += "...";
    else shown = std::string(text_);
    throw Error("expression '" + shown + "': " + reason,
                "there are integers, names, + - * //, cdiv(a, b), min(a, b) and max(a, b)");
  }

  void space() {
    while (place_ < text_.size() && (text_[place_] == ' ' || text_[place_] == '\t')) ++place_;
  }
  char peek() {
    space();
    return place_ < text_.size() ? text_[place_] : '\0';
  }
  bool take(std::string_view wanted) {
    space();
    if (text_.substr(place_, wanted.size()) != wanted) return false;
    place_ += wanted.size();
    return true;
  }

  void push(Op op, std::int64_t value) {
    out_.steps_.push_back({op, value});
    if (op == Op::literal || op == Op::symbol) largest_ = std::max(largest_, ++now_);
    else --now_;
  }

  int binary(Op op, int left, int right) {
    push(op, 0);
    return std::max(left, right) + 1;
  }

  int expression() {
    int height = term();
    while (true) {
      if (take("+")) height = binary(Op::add, height, term());
      else if (take("-")) height = binary(Op::subtract, height, term());
      else return height;
    }
  }

  int term() {
    int height = atom();
    while (true) {
      if (take("//")) height = binary(Op::divide, height, atom());
      else if (take("*")) height = binary(Op::multiply, height, atom());
      else return height;
    }
  }

  int atom() {
    const char c = peek();
    if (c == '(') return bracket();
    if (is_digit(c)) {
      push(Op::literal, integer());
      return 0;
    }
    if (!begins_name(c)) fail("it cannot be read");
    return named();
  }

  int bracket() {
    if (++brackets_ > kBrackets) fail("it is nested too deep");
    take("(");
    const int height = expression();
    if (!take(")")) fail("a ')' is missing");
    --brackets_;
    return height;
  }

  std::int64_t integer() {
    const std::size_t start = place_;
    while (place_ < text_.size() && is_digit(text_[place_])) ++place_;
    const std::string_view digits = text_.substr(start, place_ - start);
    std::int64_t value = 0;
    const auto read = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (read.ec != std::errc()) fail(std::string(digits) + " has more than 64 bits");
    if (digits.size() > 1 && digits[0] == '0' && value != 0) fail("it cannot be read");
    if (place_ < text_.size() && begins_name(text_[place_])) fail("it cannot be read");
    return value;
  }

  int named() {
    const std::size_t start = place_;
    while (place_ < text_.size() && (begins_name(text_[place_]) || is_digit(text_[place_]))) ++place_;
    std::string name(text_.substr(start, place_ - start));
    const char next = peek();
    if (next == '(') return call(name);
    if (next == '[') {
      take("[");
      if (!is_digit(peek())) fail("it cannot be read");
      name += "[" + std::to_string(integer()) + "]";
      if (!take("]")) fail("a ']' is missing");
    }
    const int slot = slot_(name);
    if (slot < 0) throw Error("'" + name + "' is not known", known_.empty() ? "" : "known are: " + known_);
    push(Op::symbol, slot);
    return 0;
  }

  int call(const std::string& name) {
    static constexpr std::pair<const char*, Op> kFunctions[] = {
        {"cdiv", Op::divide_up}, {"min", Op::smaller}, {"max", Op::larger}};
    for (const auto& [known, op] : kFunctions) {
      if (name != known) continue;
      if (++brackets_ > kBrackets) fail("it is nested too deep");
      take("(");
      const int left = expression();
      if (!take(",")) fail("a ',' is missing");
      const int right = expression();
      if (!take(")")) fail("a ')' is missing");
      --brackets_;
      return binary(op, left, right);
    }
    fail("'" + name + "' is not in the language");
  }

  std::string_view text_;
  const Slot& slot_;
  const std::string& known_;
  Program& out_;
  std::size_t place_ = 0, now_ = 0, largest_ = 0;
  int brackets_ = 0;
};

Program Program::compile(std::string_view text, const Slot& slot, const std::string& known) {
  Program out;
  out.text_ = text;
  Reader(out.text_, slot, known, out).whole();
  return out;
}

Program::Failure Program::evaluate(const std::int64_t* values, const bool* known, std::int64_t* out) const noexcept {
  std::int64_t stack[kStack];
  std::size_t top = 0;
  for (const Step& step : steps_) {
    if (step.op == Op::literal) {
      stack[top++] = step.value;
      continue;
    }
    if (step.op == Op::symbol) {
      if (known != nullptr && !known[step.value]) return {Failure::absent, 0, 0, static_cast<int>(step.value), 0};
      stack[top++] = values[step.value];
      continue;
    }
    const std::int64_t right = stack[--top], left = stack[top - 1];
    std::int64_t& result = stack[top - 1];
    switch (step.op) {
      case Op::add:
        if (__builtin_add_overflow(left, right, &result)) return {Failure::overflow, left, right, -1, '+'};
        break;
      case Op::subtract:
        if (__builtin_sub_overflow(left, right, &result)) return {Failure::overflow, left, right, -1, '-'};
        break;
      case Op::multiply:
        if (__builtin_mul_overflow(left, right, &result)) return {Failure::overflow, left, right, -1, '*'};
        break;
      case Op::divide:
        if (right <= 0 || left < 0) return {Failure::division, left, right, -1, '/'};
        result = left / right;
        break;
      case Op::divide_up:
        if (right <= 0 || left < 0) return {Failure::division, left, right, -1, 'c'};
        result = left / right + (left % right != 0);
        break;
      case Op::smaller: result = left < right ? left : right; break;
      case Op::larger: result = left > right ? left : right; break;
      case Op::literal: case Op::symbol: break;
    }
  }
  *out = stack[0];
  return {};
}

void Program::raise(const Failure& failure, const std::function<std::string(int)>& name) const {
  const std::string left = std::to_string(failure.left), right = std::to_string(failure.right);
  switch (failure.kind) {
    case Failure::absent: throw Error("'" + text_ + "': '" + name(failure.slot) + "' is not known", "");
    case Failure::division: {
      const char* sign = failure.sign == 'c' ? " cdiv " : " // ";
      throw Error("'" + text_ + "': " + left + sign + right + " needs a numerator >= 0 and a divisor > 0", "");
    }
    case Failure::overflow: case Failure::none: break;
  }
  throw Error("'" + text_ + "': " + left + " " + failure.sign + " " + right + " has more than 64 bits",
              "the tensors are too large for one launch: split the batch");
}

}  // namespace attncompile
