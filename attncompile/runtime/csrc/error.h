// What goes wrong, as one sentence and what to do. Nothing but Error is thrown on purpose, and nothing leaves the library.
#pragma once
#include <exception>
#include <string>
#include <utility>

#include "ort.h"

namespace attncompile {

class Error : public std::exception {
 public:
  Error(std::string message, std::string hint, Code code = Code::fail)
      : message_(std::move(message)), hint_(std::move(hint)), code_(code) { join(); }

  // The same error, said of a node.
  Error of(const std::string& node) const { return Error(node + ": " + message_, hint_, code_); }

  const char* what() const noexcept override { return text_.c_str(); }
  const std::string& message() const { return message_; }
  const std::string& hint() const { return hint_; }
  Code code() const { return code_; }

 private:
  void join() { text_ = hint_.empty() ? message_ : message_ + " (hint: " + hint_ + ")"; }

  std::string message_, hint_, text_;
  Code code_;
};

}  // namespace attncompile
