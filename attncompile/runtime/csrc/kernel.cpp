#include "kernel.h"

#include <algorithm>

#include "error.h"
#include "json.h"

namespace attncompile {
namespace {

constexpr std::size_t kAxes = 8, kPorts = 24, kSymbols = 160, kArguments = 160;
constexpr std::int64_t kGridLimits[] = {(std::int64_t{1} << 31) - 1, 65535, 65535};
constexpr const char* kSplit = "split the batch";
constexpr const char* kSms = "SMS";
constexpr int kOfDevice = static_cast<int>(kSymbols);  // the slot of SMS, behind all symbols

std::atomic<long> alive_kernels{0};

std::vector<std::string> texts(const json::Value& value, const std::string& where) {
  if (value.kind != json::Kind::array || value.items.size() > kAxes) throw Error(where + " is no list of sizes", "");
  std::vector<std::string> out;
  for (const json::Value& item : value.items) {
    if (item.kind != json::Kind::string) throw Error(where + " holds no expressions", "");
    out.push_back(item.text);
  }
  return out;
}

std::size_t place(const std::vector<Port>& ports, const std::string& name) {
  for (std::size_t i = 0; i < ports.size(); ++i)
    if (ports[i].name == name) return i;
  throw Error("the node has no tensor '" + name + "'", "");
}

std::string hexadecimal(const void* address) {
  std::string out;
  for (auto value = reinterpret_cast<std::uintptr_t>(address); value != 0 || out.empty(); value >>= 4)
    out.insert(out.begin(), "0123456789abcdef"[value & 15]);
  return "0x" + out;
}

}  // namespace

// What one run computes, on the stack.
struct Kernel::Sizes {
  std::int64_t sizes[kPorts * kAxes];
  bool known[kPorts * kAxes];
  std::size_t axes[kPorts];
  std::int64_t symbols[kSymbols + 1];
  void* inputs[kPorts];
  void* outputs[kPorts];
};

Kernel::Kernel(Api api, std::shared_ptr<const Bundle> bundle, const Call& call, std::string node,
               const std::string& record)
    : api_(api), bundle_(std::move(bundle)), call_(call), node_(std::move(node)) {
  try {
    read(record);
    const Driver& driver = Driver::get();
    home_ = driver.current_context();
    if (home_ != nullptr) loaded();
  } catch (const Error& error) {
    for (Loaded* now = first_; now != nullptr;) delete std::exchange(now, now->next);
    throw error.of(node_);
  }
  ++alive_kernels;
}

Kernel::~Kernel() {
  for (Loaded* now = first_; now != nullptr;) delete std::exchange(now, now->next);
  --alive_kernels;
}

long Kernel::alive() { return alive_kernels; }

void Kernel::read(const std::string& record) {
  const json::Value root = json::parse(record);
  const std::string where = "attribute launch";
  if (call_.inputs.size() > kPorts || call_.outputs.size() > kPorts) throw Error("it has too many tensors", "");
  const auto& symbols = root.object("symbols", where).members;
  if (symbols.size() > kSymbols) throw Error("it has too many symbols", "");
  const Slot size_slot = [this](const std::string& name) -> int {
    for (std::size_t i = 0; i < call_.inputs.size(); ++i)
      for (std::size_t axis = 0; axis < kAxes; ++axis)
        if (name == call_.inputs[i].name + "[" + std::to_string(axis) + "]") return static_cast<int>(i * kAxes + axis);
    return -1;
  };
  for (const auto& [name, expression] : symbols) {
    names_.push_back(name);
    symbols_.push_back(Program::compile(root.object("symbols", where).string(name, where), size_slot));
  }
  const json::Value& outputs = root.object("outputs", where);
  for (const Port& port : call_.outputs) {
    outputs_.emplace_back();
    for (const std::string& text : texts(outputs.at(port.name, where), where))
      outputs_.back().push_back(Program::compile(text, size_slot));
  }
  shapes_.resize(call_.inputs.size());
  for (const auto& [name, sizes] : root.object("shapes", where).members) read_shapes(name, texts(sizes, where));
}

void Kernel::read_shapes(const std::string& input, const std::vector<std::string>& sizes) {
  const Slot slot = [this](const std::string& name) { return symbol(name); };
  for (std::string text : sizes) {
    const bool may_be_one = !text.empty() && text.back() == '?';
    if (may_be_one) text.pop_back();
    shapes_[place(call_.inputs, input)].push_back({Program::compile(text, slot, symbol_list()), may_be_one});
  }
}

int Kernel::symbol(const std::string& name) const {
  const auto found = std::find(names_.begin(), names_.end(), name);
  if (found != names_.end()) return static_cast<int>(found - names_.begin());
  return name == kSms ? kOfDevice : -1;
}

std::string Kernel::symbol_list() const {
  std::string out;
  for (const std::string& name : names_) out += (out.empty() ? "" : ", ") + name;
  return out;
}

std::string Kernel::size_name(int slot) const {
  const auto place = static_cast<std::size_t>(slot);
  return call_.inputs[place / kAxes].name + "[" + std::to_string(place % kAxes) + "]";
}

void Kernel::check(OrtStatus* status) const {
  if (status == nullptr) return;
  const std::string text = api_.message(status);
  api_.release(status);
  throw Error(text, "");
}

// The kernel in the context of this thread.
const Kernel::Loaded& Kernel::loaded() {
  const Driver& driver = Driver::get();
  Handle context = driver.current_context();
  if (context == nullptr) {
    context = home_;
    if (context == nullptr)
      throw Error("no CUDA context is current in this thread", "run the session in a thread that uses its device");
    driver.make_current(context);
  }
  const unsigned long long id = driver.context_id(context);
  const auto search = [&]() -> const Loaded* {
    for (const Loaded* now = first_.load(std::memory_order_acquire); now != nullptr; now = now->next)
      if (now->context == context && now->id == id) return now;
    return nullptr;
  };
  if (const Loaded* found = search()) return *found;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const Loaded* found = search()) return *found;
  Loaded* made = load(driver, context, id);
  made->next = first_.load(std::memory_order_relaxed);
  first_.store(made, std::memory_order_release);
  return *made;
}

Kernel::Loaded* Kernel::load(const Driver& driver, Handle context, unsigned long long id) const {
  const int capability = driver.capability();
  const Entry& entry = choose(capability, driver.shared_limit());
  auto made = std::make_unique<Loaded>();
  made->context = context;
  made->id = id;
  made->entry = &entry;
  made->multiprocessors = driver.multiprocessors();
  made->next = nullptr;
  bind(*made);
  made->module = bundle_->load(driver, context, id, entry, Bundle::as_cubin(entry, capability));
  return made.release();
}

// The first tactic that the device has room for.
const Entry& Kernel::choose(int capability, int shared_limit) const {
  const std::vector<const Entry*> best = Bundle::best(call_, capability);
  const std::string device = "sm_" + std::to_string(capability);
  if (best.empty())
    throw Error(bundle_->index() + " has no kernel of " + call_.op + " that runs on " + device,
                "compile the model for this GPU: --arch " + std::to_string(capability), Code::not_implemented);
  for (const Entry* entry : best)
    if (entry->plain && entry->hidden == 0 && entry->shared <= shared_limit) return *entry;
  const Entry& first = *best.front();
  if (!first.plain || first.hidden != 0)
    throw Error(call_.op + " " + first.tactic + " needs scratch memory or tensor maps, which no launch here has",
                "use a newer version of attncompile's runtime", Code::not_implemented);
  throw Error(call_.op + " " + first.tactic + " needs " + std::to_string(first.shared) +
                  " bytes of shared memory, the GPU has " + std::to_string(shared_limit),
              "compile the model for this GPU: --arch " + std::to_string(capability), Code::not_implemented);
}

void Kernel::bind(Loaded& loaded) const {
  const Slot slot = [this](const std::string& name) { return symbol(name); };
  const std::string known = symbol_list();
  if (loaded.entry->arguments.size() > kArguments) throw Error("it has too many arguments", "");
  for (const Argument& argument : loaded.entry->arguments) {
    Step step{&argument, 0, {}};
    if (argument.kind == Argument::input) step.port = place(call_.inputs, argument.name);
    else if (argument.kind == Argument::output) step.port = place(call_.outputs, argument.name);
    else step.program = Program::compile(argument.expression, slot, known);
    loaded.steps.push_back(std::move(step));
  }
  for (const std::string& text : loaded.entry->grid) loaded.grid.push_back(Program::compile(text, slot, known));
}

void Kernel::run(OrtKernelContext* context) {
  try {
    Sizes sizes;
    launch(context, sizes);
  } catch (const Error& error) {
    throw error.of(node_);
  }
}

void Kernel::launch(OrtKernelContext* context, Sizes& sizes) {
  read_inputs(context, sizes);
  evaluate_symbols(sizes);
  check_shapes(sizes);
  const Loaded& kernel = loaded();
  sizes.symbols[kOfDevice] = kernel.multiprocessors;
  make_outputs(context, sizes);
  void* stream = nullptr;
  check(api_.stream(context, &stream));
  go(kernel, stream, sizes);
}

void Kernel::read_inputs(OrtKernelContext* context, Sizes& sizes) const {
  for (std::size_t i = 0; i < call_.inputs.size(); ++i) {
    const OrtValue* value = nullptr;
    check(api_.input(context, i, &value));
    if (value == nullptr) throw Error("input " + call_.inputs[i].name + " is missing", "");
    OrtTensorInfo* info = nullptr;
    check(api_.tensor_info(value, &info));
    std::size_t axes = 0;
    OrtStatus* status = api_.axes(info, &axes);
    if (status == nullptr && axes <= kAxes) status = api_.sizes(info, sizes.sizes + i * kAxes, axes);
    api_.release(info);
    check(status);
    if (axes > kAxes) throw Error(call_.inputs[i].name + " has " + std::to_string(axes) + " axes", "");
    for (std::size_t axis = 0; axis < kAxes; ++axis) sizes.known[i * kAxes + axis] = axis < axes;
    sizes.axes[i] = axes;
    check(api_.data(value, &sizes.inputs[i]));
  }
}

std::int64_t Kernel::value(const Program& program, const Sizes& sizes, bool of_symbols) const {
  std::int64_t found = 0;
  const Program::Failure failure =
      of_symbols ? program.evaluate(sizes.symbols, nullptr, &found) : program.evaluate(sizes.sizes, sizes.known, &found);
  if (failure.kind != Program::Failure::none) program.raise(failure, [this](int slot) { return size_name(slot); });
  return found;
}

void Kernel::evaluate_symbols(Sizes& sizes) const {
  for (std::size_t i = 0; i < symbols_.size(); ++i) sizes.symbols[i] = value(symbols_[i], sizes, false);
}

void Kernel::check_shapes(const Sizes& sizes) const {
  for (std::size_t i = 0; i < shapes_.size(); ++i) {
    const std::vector<Size>& shape = shapes_[i];
    if (shape.empty()) continue;
    const std::string& name = call_.inputs[i].name;
    if (sizes.axes[i] != shape.size())
      throw Error(name + " has " + std::to_string(sizes.axes[i]) + " axes, not " + std::to_string(shape.size()),
                  "check the shapes of the model's inputs");
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
      const std::int64_t size = sizes.sizes[i * kAxes + axis];
      const std::int64_t wanted = value(shape[axis].program, sizes, true);
      if (size == wanted || (size == 1 && shape[axis].may_be_one)) continue;
      throw Error(name + " has size " + std::to_string(size) + " on axis " + std::to_string(axis) + ", not " +
                      shape[axis].program.text() + " = " + std::to_string(wanted),
                  "check the shapes of the model's inputs");
    }
  }
}

void Kernel::make_outputs(OrtKernelContext* context, Sizes& sizes) const {
  for (std::size_t i = 0; i < outputs_.size(); ++i) {
    std::int64_t shape[kAxes];
    for (std::size_t axis = 0; axis < outputs_[i].size(); ++axis) shape[axis] = value(outputs_[i][axis], sizes, false);
    OrtValue* made = nullptr;
    check(api_.output(context, i, shape, outputs_[i].size(), &made));
    if (made == nullptr) throw Error("output " + call_.outputs[i].name + " is missing", "");
    check(api_.data(made, &sizes.outputs[i]));
  }
}

void Kernel::go(const Loaded& loaded, Handle stream, const Sizes& sizes) const {
  void* pointers[kArguments];
  std::int32_t numbers[kArguments];
  void* arguments[kArguments];
  for (std::size_t i = 0; i < loaded.steps.size(); ++i) {
    const Step& step = loaded.steps[i];
    const Argument& argument = *step.argument;
    if (argument.kind == Argument::int32) {
      const std::int64_t number = value(step.program, sizes, true);
      if (number < INT32_MIN || number > INT32_MAX)
        throw Error("argument " + argument.name + " = " + argument.expression + " is " + std::to_string(number) +
                        ", which is no int32",
                    "the tensors are too large for one launch: split the batch");
      numbers[i] = static_cast<std::int32_t>(number);
      arguments[i] = &numbers[i];
      continue;
    }
    pointers[i] = argument.kind == Argument::input ? sizes.inputs[step.port] : sizes.outputs[step.port];
    if (reinterpret_cast<std::uintptr_t>(pointers[i]) % static_cast<std::uintptr_t>(argument.align) != 0)
      throw Error(argument.name + " at " + hexadecimal(pointers[i]) + " is not a multiple of " +
                      std::to_string(argument.align) + " bytes",
                  "copy it to memory of its own");
    arguments[i] = &pointers[i];
  }
  unsigned grid[3];
  bool empty = false;
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const std::int64_t blocks = value(loaded.grid[axis], sizes, true);
    if (blocks < 0 || blocks > kGridLimits[axis])
      throw Error("a grid of " + std::to_string(blocks) + " blocks on axis " + "xyz"[axis] + "; CUDA has at most " +
                      std::to_string(kGridLimits[axis]),
                  kSplit);
    grid[axis] = static_cast<unsigned>(blocks);
    empty = empty || blocks == 0;
  }
  if (empty) return;
  const Driver& driver = Driver::get();
  const int failed = driver.launch(loaded.module->function(), grid, static_cast<unsigned>(loaded.entry->threads),
                                   static_cast<unsigned>(loaded.entry->shared), stream, arguments);
  if (failed != 0) driver.raise("cuLaunchKernel", failed);
}

}  // namespace attncompile
