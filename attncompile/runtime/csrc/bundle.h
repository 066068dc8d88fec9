// A bundle of kernels (docs/kernels.md): `bundle.json` is read and checked at once, code when it is loaded.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver.h"

namespace attncompile {

namespace json {
class Value;
}

struct Argument {
  enum Kind { input, int32, output } kind;
  std::string name;
  std::string type;
  std::string expression;
  std::int64_t align;
};

struct Entry {
  std::string id, op, tactic, name, cubin, ptx;
  std::vector<Argument> arguments;
  std::array<std::string, 3> grid;
  int architecture, threads, shared, hidden;
  bool specific, plain;
};

// A tensor that a node has, in the order of the node's inputs or outputs; `type` is ONNX's number of it.
struct Port {
  std::string name;
  int type;
};

// A general call. `entries` by architecture, then rank. Nodes of it have exactly these inputs and outputs.
struct Call {
  std::string key, op;
  std::vector<const Entry*> entries;
  std::vector<Port> inputs, outputs;
};

// A module in one context, and the function of its entry. Unloaded when the last kernel that uses it is gone.
class Module {
 public:
  Module(const Driver& driver, Handle context, const Entry& entry, const std::string& code);
  ~Module();
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  Handle function() const { return function_; }

 private:
  const Driver& driver_;
  Handle context_, module_ = nullptr, function_ = nullptr;
};

class Bundle {
 public:
  // Throws Error that names the file.
  explicit Bundle(std::string folder);

  const std::string& index() const { return index_; }
  const std::vector<std::unique_ptr<Call>>& calls() const { return calls_; }
  // Whether the model beside it has norms of sums in float16.
  bool strict_norms() const { return strict_norms_; }

  // The entries of `call` of the architecture that suits a device best, best first: its own, else the nearest lower
  // minor, else the newest whose PTX the driver can translate.
  static std::vector<const Entry*> best(const Call& call, int capability);
  static bool as_cubin(const Entry& entry, int capability);

  // `entry` in the context that is current, loaded once for all kernels that live. Throws Error.
  std::shared_ptr<const Module> load(const Driver& driver, Handle context, unsigned long long id, const Entry& entry,
                                     bool cubin) const;

 private:
  void read_entry(const json::Value& value);
  void read_call(const json::Value& value);
  void read_ports(Call& call) const;
  std::string code(const Entry& entry, bool cubin) const;

  std::string folder_, index_;
  bool strict_norms_ = false;
  std::map<std::string, std::unique_ptr<Entry>> entries_;
  std::vector<std::unique_ptr<Call>> calls_;

  using Place = std::pair<std::pair<Handle, unsigned long long>, std::pair<const Entry*, bool>>;
  mutable std::mutex mutex_;
  mutable std::map<Place, std::weak_ptr<const Module>> loaded_;
};

}  // namespace attncompile
