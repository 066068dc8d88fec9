// One node: its numbers are computed from the sizes at hand, then its kernel is launched on ONNX Runtime's stream.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle.h"
#include "expression.h"
#include "ort.h"

namespace attncompile {

class Kernel {
 public:
  // `record` is the node's attribute `launch`: JSON with `symbols` (expressions over sizes of inputs, such as
  // "query[1]"), `outputs` (the sizes of each, likewise) and `shapes` (of inputs, over the symbols; "NK?" may also be 1).
  // Throws Error that names the node.
  Kernel(Api api, std::shared_ptr<const Bundle> bundle, const Call& call, std::string node, const std::string& record);
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  // Allocates nothing once the context of the calling thread is known. Throws Error that names the node.
  void run(OrtKernelContext* context);

  static long alive();

 private:
  struct Size {
    Program program;
    bool may_be_one;
  };
  struct Step {  // one launch argument
    const Argument* argument;
    std::size_t port;
    Program program;
  };
  // The kernel in one context.
  struct Loaded {
    Handle context;
    unsigned long long id;
    std::shared_ptr<const Module> module;
    const Entry* entry;
    std::vector<Step> steps;
    std::vector<Program> grid;
    std::int64_t multiprocessors;
    Loaded* next;
  };
  struct Sizes;

  void read(const std::string& record);
  void read_shapes(const std::string& input, const std::vector<std::string>& texts);
  const Loaded& loaded();
  Loaded* load(const Driver& driver, Handle context, unsigned long long id) const;
  const Entry& choose(int capability, int shared_limit) const;
  void bind(Loaded& loaded) const;
  void launch(OrtKernelContext* context, Sizes& sizes);
  void read_inputs(OrtKernelContext* context, Sizes& sizes) const;
  void evaluate_symbols(Sizes& sizes) const;
  void check_shapes(const Sizes& sizes) const;
  void make_outputs(OrtKernelContext* context, Sizes& sizes) const;
  void go(const Loaded& loaded, Handle stream, const Sizes& sizes) const;
  std::int64_t value(const Program& program, const Sizes& sizes, bool of_symbols) const;
  std::string size_name(int slot) const;
  int symbol(const std::string& name) const;
  std::string symbol_list() const;
  void check(OrtStatus* status) const;

  Api api_;
  std::shared_ptr<const Bundle> bundle_;
  const Call& call_;
  std::string node_;
  std::vector<std::string> names_;         // of the symbols
  std::vector<Program> symbols_;           // over sizes
  std::vector<std::vector<Size>> shapes_;  // by input, over symbols; empty: not checked
  std::vector<std::vector<Program>> outputs_;
  std::atomic<Handle> home_{nullptr};      // the context in which the session was made
  std::atomic<Loaded*> first_{nullptr};    // a list that only grows
  std::mutex mutex_;
};

}  // namespace attncompile
