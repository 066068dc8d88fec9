#include "bundle.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "cubin.h"
#include "error.h"
#include "json.h"
#include "sha256.h"

namespace attncompile {
namespace {

constexpr int kFormat = 1;
constexpr int kPlainShared = 48 * 1024;  // bytes that need no attribute
constexpr std::size_t kLargest = 1u << 30;
constexpr const char* kAgain = "compile the model again: attncompile MODEL --target onnxruntime-cuda";

[[noreturn]] void bad(const std::string& path, const std::string& reason) { throw Error(path + ": " + reason, kAgain); }

std::string slurp(const std::string& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) != 0) bad(path, std::strerror(errno));
  if (!S_ISREG(status.st_mode)) bad(path, "it is no file");
  if (static_cast<std::size_t>(status.st_size) > kLargest) bad(path, "it is too large");
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) bad(path, std::strerror(errno));
  std::string data(static_cast<std::size_t>(status.st_size), '\0');
  const std::size_t got = std::fread(data.data(), 1, data.size(), file);
  std::fclose(file);
  if (got != data.size()) bad(path, "it cannot be read");
  return data;
}

bool is_hex(const std::string& text, std::size_t length) {
  return text.size() == length &&
         std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool is_name(const std::string& text) {
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; };
  return !text.empty() && letter(text[0]) &&
         std::all_of(text.begin(), text.end(), [&](char c) { return letter(c) || (c >= '0' && c <= '9'); });
}

// ONNX's TensorProto.DataType, which ONNX Runtime's numbers follow.
int type_number(const std::string& name) {
  static const std::pair<const char*, int> kTypes[] = {
      {"float32", 1}, {"uint8", 2}, {"int8", 3}, {"uint16", 4}, {"int16", 5}, {"int32", 6}, {"int64", 7},
      {"bool", 9}, {"float16", 10}, {"float64", 11}, {"uint32", 12}, {"uint64", 13}, {"bfloat16", 16}};
  for (const auto& [known, number] : kTypes)
    if (name == known) return number;
  throw Error("the element type '" + name + "' is not known", "");
}

// The value without some of its members.
json::Value without(const json::Value& value, std::initializer_list<const char*> names) {
  json::Value out;
  out.kind = json::Kind::object;
  for (const auto& member : value.members)
    if (std::find(names.begin(), names.end(), member.first) == names.end()) out.members.push_back(member);
  return out;
}

json::Value text_value(const std::string& text) {
  json::Value out;
  out.kind = json::Kind::string;
  out.text = text;
  return out;
}

Argument read_argument(const json::Value& value, const std::string& where) {
  Argument out{};
  out.name = value.string("name", where);
  out.type = value.string("type", where);
  out.expression = value.string("expression", where);
  out.align = value.integer("align", where, 1, 1 << 20);
  const std::string& kind = value.string("kind", where);
  if (kind == "input") out.kind = Argument::input;
  else if (kind == "int32") out.kind = Argument::int32;
  else if (kind == "output") out.kind = Argument::output;
  else throw Error(where + ": argument " + out.name + " is of an unknown kind '" + kind + "'", "");
  if (out.kind != Argument::int32) type_number(out.type);
  return out;
}

void add_port(std::vector<Port>& ports, const Argument& argument, const std::string& where) {
  const int type = type_number(argument.type);
  for (const Port& port : ports) {
    if (port.name != argument.name) continue;
    if (port.type != type) throw Error(where + ": its kernels do not agree on the type of " + port.name, "");
    return;
  }
  ports.push_back({argument.name, type});
}

}  // namespace

Module::Module(const Driver& driver, Handle context, const Entry& entry, const std::string& code)
    : driver_(driver), context_(context), module_(driver.load(code.c_str())) {
  try {
    function_ = driver.function(module_, entry.name.c_str());
    if (entry.shared > kPlainShared) driver.allow_shared(function_, entry.shared);
  } catch (...) {
    driver.unload(module_);
    throw;
  }
}

Module::~Module() {
  const Driver::Within within(driver_, context_);
  if (!within.entered()) return;  // the context is gone, and the module with it
  within.wait();
  driver_.unload(module_);
}

Bundle::Bundle(std::string folder) : folder_(std::move(folder)), index_(folder_ + "/bundle.json") {
  struct stat status {};
  if (stat(index_.c_str(), &status) != 0)
    throw Error(folder_ + " is no bundle of kernels: " + index_ + ": " + std::strerror(errno), kAgain);
  const std::string text = slurp(index_);
  try {
    const json::Value root = json::parse(text);
    const std::int64_t format = root.integer("format", "the index", 0, 1 << 30);
    if (format != kFormat)
      throw Error("its format is " + std::to_string(format) + ", this library reads " + std::to_string(kFormat), "");
    strict_norms_ = root.find("strict_norms") != nullptr && root.boolean("strict_norms", "the index");
    for (const json::Value& entry : root.array("entries", "the index")) read_entry(entry);
    for (const json::Value& call : root.array("calls", "the index")) read_call(call);
  } catch (const Error& error) {
    bad(index_, error.message());
  }
}

void Bundle::read_entry(const json::Value& value) {
  auto out = std::make_unique<Entry>();
  out->id = value.string("id", "an entry");
  const std::string where = "entry " + out->id;
  if (!is_hex(out->id, 16)) throw Error(where + ": its id is no id", "");
  const json::Value& files = value.object("files", where);
  out->cubin = files.string("cubin", where);
  out->ptx = files.string("ptx", where);
  if (!is_hex(out->cubin, 64) || !is_hex(out->ptx, 64)) throw Error(where + ": its files have no hashes", "");
  json::Value facts = without(value, {"id", "files"});
  facts.members.emplace_back("cubin", text_value(out->cubin));
  facts.members.emplace_back("ptx", text_value(out->ptx));
  if (sha256(json::canonical(facts)).substr(0, 16) != out->id) throw Error(where + " was changed", "");
  out->op = value.string("op", where);
  out->tactic = value.string("tactic", where);
  out->name = value.string("name", where);
  if (!is_name(out->name)) throw Error(where + ": the name of its function is none", "");
  out->architecture = static_cast<int>(value.integer("architecture", where, 1, 10000));
  out->threads = static_cast<int>(value.integer("threads", where, 32, 1024));
  out->shared = static_cast<int>(value.integer("shared", where, 0, 1 << 30));
  out->hidden = static_cast<int>(value.integer("hidden", where, 0, 64));
  out->specific = value.boolean("specific", where);
  out->plain = value.string("abi", where) == "plain";
  for (const json::Value& argument : value.array("arguments", where))
    out->arguments.push_back(read_argument(argument, where));
  const auto& grid = value.array("grid", where);
  if (grid.size() != 3) throw Error(where + ": its grid has not three axes", "");
  for (std::size_t i = 0; i < 3; ++i) {
    if (grid[i].kind != json::Kind::string) throw Error(where + ": its grid holds no expressions", "");
    out->grid[i] = grid[i].text;
  }
  std::string id = out->id;
  if (!entries_.emplace(std::move(id), std::move(out)).second) throw Error(where + " is there twice", "");
}

void Bundle::read_call(const json::Value& value) {
  auto out = std::make_unique<Call>();
  out->key = value.string("key", "a call");
  const std::string where = "call " + out->key;
  if (sha256(json::canonical(without(value, {"key", "kernels", "refused"}))).substr(0, 16) != out->key)
    throw Error(where + " was changed", "");
  for (const auto& known : calls_)
    if (known->key == out->key) throw Error(where + " is there twice", "");
  out->op = value.string("op", where);
  if (!is_name(out->op)) throw Error(where + ": the name of its op is none", "");
  std::vector<std::pair<std::pair<std::int64_t, std::int64_t>, const Entry*>> ranked;
  for (const json::Value& kernel : value.array("kernels", where)) {
    const std::string& id = kernel.string("entry", where);
    const auto found = entries_.find(id);
    if (found == entries_.end()) throw Error(where + " names an entry " + id + " that is not there", "");
    const std::int64_t architecture = kernel.integer("architecture", where, 1, 10000);
    ranked.push_back({{architecture, kernel.integer("rank", where, 0, 1 << 20)}, found->second.get()});
  }
  std::sort(ranked.begin(), ranked.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [order, entry] : ranked) out->entries.push_back(entry);
  read_ports(*out);
  calls_.push_back(std::move(out));
}

void Bundle::read_ports(Call& call) const {
  const std::string where = "call " + call.key;
  for (const Entry* entry : call.entries)
    for (const Argument& argument : entry->arguments) {
      if (argument.kind == Argument::input) add_port(call.inputs, argument, where);
      if (argument.kind == Argument::output) add_port(call.outputs, argument, where);
    }
  if (!call.entries.empty() && call.outputs.empty()) throw Error(where + " has no output", "");
}

bool Bundle::as_cubin(const Entry& entry, int capability) {
  return entry.architecture == capability ||
         (!entry.specific && entry.architecture < capability && entry.architecture / 10 == capability / 10);
}

std::vector<const Entry*> Bundle::best(const Call& call, int capability) {
  std::vector<const Entry*> found;
  std::pair<bool, int> cheapest{true, 1 << 30};
  for (const Entry* entry : call.entries) {
    if (entry->architecture != capability && (entry->specific || entry->architecture > capability)) continue;
    const std::pair<bool, int> price{!as_cubin(*entry, capability), capability - entry->architecture};
    if (price < cheapest) {
      found.clear();
      cheapest = price;
    }
    if (price == cheapest) found.push_back(entry);
  }
  return found;
}

std::string Bundle::code(const Entry& entry, bool cubin) const {
  const std::string& hash = cubin ? entry.cubin : entry.ptx;
  const std::string path = folder_ + "/kernels/" + hash + (cubin ? ".cubin" : ".ptx");
  std::string data = slurp(path);
  if (sha256(data) != hash)
    bad(path, "its contents are not those of the index (" + std::to_string(data.size()) + " bytes)");
  if (cubin) {
    try {
      check_cubin(data);
    } catch (const Error& error) {
      bad(path, error.message());
    }
  }
  return data;
}

std::shared_ptr<const Module> Bundle::load(const Driver& driver, Handle context, unsigned long long id,
                                           const Entry& entry, bool cubin) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::weak_ptr<const Module>& known = loaded_[{{context, id}, {&entry, cubin}}];
  std::shared_ptr<const Module> module = known.lock();
  if (module == nullptr) {
    module = std::make_shared<const Module>(driver, context, entry, code(entry, cubin));
    known = module;
  }
  return module;
}

}  // namespace attncompile
