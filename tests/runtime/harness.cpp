// Drives the library through a double of ONNX Runtime's table of functions, so that sanitizers, a counter of allocations
// and thousands of damaged files see nothing but the library. Its sources are included: one program, one set of flags.
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <random>
#include <sstream>
#include <thread>

#include "bundle.cpp"
#include "cubin.cpp"
#include "driver.cpp"
#include "expression.cpp"
#include "json.cpp"
#include "kernel.cpp"
#include "library.cpp"
#include "sha256.cpp"

#ifdef COUNT_ALLOCATIONS
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
}
static std::atomic<long> allocations{0};
extern "C" void* malloc(std::size_t n) { ++allocations; return __libc_malloc(n); }
extern "C" void* calloc(std::size_t n, std::size_t m) { ++allocations; return __libc_calloc(n, m); }
extern "C" void* realloc(void* p, std::size_t n) { ++allocations; return __libc_realloc(p, n); }
#endif

using namespace attncompile;

namespace {

struct Tensor {
  std::vector<std::int64_t> sizes;
  alignas(64) unsigned char data[64];
};

struct Context {
  std::vector<Tensor> inputs, outputs;
  void* stream = reinterpret_cast<void*>(0x57);
  std::size_t fails_at = SIZE_MAX;  // which call of the table fails
  std::size_t calls = 0;
};

struct Status {
  int code;
  std::string text;
};

struct Info {
  std::string node, record;
  bool strict = false;  // whether it has the attribute `strict_norms`
};

std::atomic<long> statuses{0};

OrtStatus* failed(int code, const char* text) {
  ++statuses;
  return reinterpret_cast<OrtStatus*>(new Status{code, text});
}
OrtStatus* counted(Context& context) {
  return context.calls++ == context.fails_at ? failed(1, "the double of ONNX Runtime fails") : nullptr;
}
OrtStatus* give(const std::string& text, char* out, std::size_t* size) {
  if (out != nullptr) std::memcpy(out, text.c_str(), text.size() + 1);
  *size = text.size() + 1;
  return nullptr;
}

std::map<std::string, std::string> options;  // of the session
std::vector<const CustomOp*> ops;
std::map<const void*, std::vector<const CustomOp*>> ops_of;  // by domain
const void* added = nullptr;                                 // the domain that a session was given last
const char* version = "double";

Context& of(const void* context) { return *static_cast<Context*>(const_cast<void*>(context)); }

const void* slots[300];

template <typename Function>
void put(int slot, Function* function) { slots[slot] = reinterpret_cast<const void*>(function); }

void fill() {
  put(0, +[](int code, const char* text) { return failed(code, text); });
  put(2, +[](const OrtStatus* s) { return reinterpret_cast<const Status*>(s)->text.c_str(); });
  put(93, +[](OrtStatus* s) { --statuses; delete reinterpret_cast<Status*>(s); });
  put(26, +[](const char*, OrtCustomOpDomain** out) -> OrtStatus* {
    *out = reinterpret_cast<OrtCustomOpDomain*>(new int(0));
    return nullptr;
  });
  put(27, +[](OrtCustomOpDomain* domain, const void* op) -> OrtStatus* {
    ops_of[domain].push_back(static_cast<const CustomOp*>(op));
    ops.push_back(static_cast<const CustomOp*>(op));
    return nullptr;
  });
  put(28, +[](OrtSessionOptions*, OrtCustomOpDomain* domain) -> OrtStatus* {
    added = domain;
    return nullptr;
  });
  put(101, +[](OrtCustomOpDomain* domain) { delete reinterpret_cast<int*>(domain); });
  put(237, +[](const OrtSessionOptions*, const char* key, int* out) -> OrtStatus* {
    *out = static_cast<int>(options.count(key));
    return nullptr;
  });
  put(238, +[](const OrtSessionOptions*, const char* key, char* out, std::size_t* size) {
    return give(options.at(key), out, size);
  });
  put(87, +[](const OrtKernelInfo* info, const char* name, char* out, std::size_t* size) {
    const Info& node = *reinterpret_cast<const Info*>(info);
    if (std::string(name) == "launch") return give(node.record, out, size);
    return node.strict && std::string(name) == "strict_norms" ? give("1", out, size) : failed(1, "no such attribute");
  });
  put(244, +[](const OrtKernelInfo* info, char* out, std::size_t* size) {
    return give(reinterpret_cast<const Info*>(info)->node, out, size);
  });
  put(90, +[](const OrtKernelContext* c, std::size_t i, const OrtValue** out) {
    *out = reinterpret_cast<const OrtValue*>(&of(c).inputs.at(i));
    return counted(of(c));
  });
  put(91, +[](OrtKernelContext* c, std::size_t i, const std::int64_t* sizes, std::size_t axes, OrtValue** out) {
    Tensor& tensor = of(c).outputs.at(i);
    for (std::size_t axis = 0; axis < axes; ++axis) tensor.sizes.at(axis) = sizes[axis];
    *out = reinterpret_cast<OrtValue*>(&tensor);
    return counted(of(c));
  });
  put(193, +[](const OrtKernelContext* c, void** out) {
    *out = of(c).stream;
    return counted(of(c));
  });
  put(51, +[](const OrtValue* value, void** out) -> OrtStatus* {
    *out = const_cast<unsigned char*>(reinterpret_cast<const Tensor*>(value)->data);
    return nullptr;
  });
  put(65, +[](const OrtValue* value, OrtTensorInfo** out) -> OrtStatus* {
    *out = reinterpret_cast<OrtTensorInfo*>(const_cast<OrtValue*>(value));
    return nullptr;
  });
  put(99, +[](OrtTensorInfo*) {});
  put(61, +[](const OrtTensorInfo* info, std::size_t* out) -> OrtStatus* {
    *out = reinterpret_cast<const Tensor*>(info)->sizes.size();
    return nullptr;
  });
  put(62, +[](const OrtTensorInfo* info, std::int64_t* out, std::size_t axes) -> OrtStatus* {
    for (std::size_t i = 0; i < axes; ++i) out[i] = reinterpret_cast<const Tensor*>(info)->sizes[i];
    return nullptr;
  });
}

std::string take(OrtStatus* status) {
  if (status == nullptr) return "";
  const std::string text = reinterpret_cast<Status*>(status)->text;
  --statuses;
  delete reinterpret_cast<Status*>(status);
  return text;
}

struct Double {
  void* library;
  template <typename Function>
  Function* get(const char* name) const { return reinterpret_cast<Function*>(dlsym(library, name)); }
};

Context context_of(const CustomOp* op) {
  Context context;
  context.inputs.resize(op->input_count(op));
  context.outputs.resize(op->output_count(op));
  for (Tensor& tensor : context.inputs) tensor.sizes = {2, 130, 4, 64};
  for (Tensor& tensor : context.outputs) tensor.sizes = {0, 0, 0, 0};
  return context;
}

const OrtApiBase base = {[](std::uint32_t) -> Slots { return slots; }, [] { return version; }};

// One session: registration, a kernel of each op, `runs` runs, the end. What went wrong first, or "".
std::string session(const std::string& record, int runs, std::size_t fails_at = SIZE_MAX) {
  ops.clear();
  std::string said = take(RegisterCustomOps(nullptr, &base));
  if (!said.empty()) return said;
  static std::vector<const CustomOp*> known;  // a second registration of the same bundle adds no op
  if (!ops.empty()) known = ops;
  for (const CustomOp* op : known) {
    const Info info{"node", record};
    void* kernel = nullptr;
    said = take(op->create(op, slots, reinterpret_cast<const OrtKernelInfo*>(&info), &kernel));
    if (!said.empty()) return said;
    Context context = context_of(op);
    context.fails_at = fails_at;
    for (int i = 0; i < runs && said.empty(); ++i)
      said = take(op->compute(kernel, reinterpret_cast<OrtKernelContext*>(&context)));
    op->destroy(kernel);
    if (!said.empty()) return said;
  }
  return "";
}

std::string slurped(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void spit(const std::string& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

int bad_result(const std::string& what) {
  std::cout << "FAILED: " << what << std::endl;
  return 1;
}

bool refuses(const std::string& folder) {
  try {
    const Bundle bundle(folder);
    return false;
  } catch (const Error& error) {
    if (std::string(error.what()).find(folder) == std::string::npos) throw std::runtime_error("no file is named");
    return true;
  }
}

// Every driver call fails, at each of its first calls; every call of ONNX Runtime fails.
int inject(const Double& cuda, const std::string& record) {
  const char* const functions[] = {"cuCtxGetCurrent", "cuCtxGetId", "cuCtxGetDevice", "cuDeviceGetAttribute",
                                   "cuModuleLoadDataEx", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"};
  for (const char* name : functions) {
    std::string said;
    for (long after = 0; after < 6; ++after) {
      cuda.get<void(const char*, int, long)>("double_fail")(name, 209, after);
      const std::string now = session(record, 2);
      if (after == 0) said = now;
      if (!now.empty() && now.find(name) == std::string::npos) return bad_result(now);
    }
    cuda.get<void(const char*, int, long)>("double_fail")("", 0, 0);
    std::cout << said << "\n";
  }
  for (std::size_t at = 0; at < 5; ++at) {
    const std::string said = session(record, 1, at);
    if (said.find("node: the double of ONNX Runtime fails") != 0) return bad_result("call " + std::to_string(at) + ": " + said);
  }
  if (!session(record, 3).empty()) return bad_result("it does not recover");
  const long loaded = cuda.get<long()>("double_loaded")(), unloaded = cuda.get<long()>("double_unloaded")();
  std::cout << "loaded " << loaded << " unloaded " << unloaded << "\n";
  if (loaded == 0 || loaded != unloaded) return bad_result("modules are not unloaded");
  if (statuses != 0) return bad_result("statuses are not released");
  return 0;
}

int fuzz(const std::string& folder, const std::string& record) {
  const std::string path = folder + "/bundle.json", whole = slurped(path);
  const std::size_t value_end = whole.find_last_of('}');
  for (std::size_t length = 0; length <= value_end; ++length) {
    spit(path, whole.substr(0, length));
    if (!refuses(folder)) return bad_result("an index cut off after " + std::to_string(length) + " bytes is taken");
  }
  const std::size_t begin = whole.find("\"entries\""), end = whole.find("\"nodes\"");
  std::size_t taken = 0;
  for (std::size_t at = 0; at < whole.size(); ++at) {
    std::string changed = whole;
    changed[at] = static_cast<char>(changed[at] ^ (at % 2 ? 1 : 0x20));
    spit(path, changed);
    if (refuses(folder)) continue;
    ++taken;
    if (at > begin && at < end) return bad_result("byte " + std::to_string(at) + " may be changed");
  }
  std::cout << "flips that say nothing: " << taken << "\n";
  spit(path, whole);
  if (refuses(folder)) return bad_result("the whole index is refused");

  const Bundle bundle(folder);
  for (const auto& call : bundle.calls())
    for (const Entry* entry : call->entries) {
      const std::string code = slurped(folder + "/kernels/" + entry->cubin + ".cubin");
      check_cubin(code);
      for (std::size_t length = 0; length < code.size(); ++length) {
        try {
          check_cubin(std::string_view(std::string(code.data(), length)));
          return bad_result("a cubin cut off after " + std::to_string(length) + " bytes is taken");
        } catch (const Error&) {
        }
      }
      for (std::size_t at = 0; at < code.size(); ++at)
        for (const int mask : {1, 0x7f, 0x80, 0xff}) {
          std::string changed = code;
          changed[at] = static_cast<char>(changed[at] ^ mask);
          try {
            check_cubin(changed);
          } catch (const Error&) {
          }
        }
      break;
    }

  for (std::size_t length = 0; length < record.size(); ++length)
    if (session(record.substr(0, length), 1).empty()) return bad_result("a record that is cut off is taken");
  std::mt19937 random(0);
  const std::string letters = "0123456789+-*/(),[] abcNQHdivminax?\"{}:";
  for (int i = 0; i < 10000; ++i) {
    std::string text;
    for (std::size_t n = random() % 40; n-- > 0;) text += letters[random() % letters.size()];
    try {
      const Program program = Program::compile(text, [](const std::string&) { return 0; });
      const std::int64_t values[] = {static_cast<std::int64_t>(random())};
      std::int64_t out = 0;
      program.evaluate(values, nullptr, &out);
    } catch (const Error&) {
    }
    std::string changed = record;
    changed[random() % changed.size()] = letters[random() % letters.size()];
    if (i < 1000) session(changed, 1);
  }
  return statuses == 0 ? 0 : bad_result("statuses are not released");
}

int threads(const Double& cuda, const std::string& record) {
  if (!session(record, 1).empty()) return bad_result("no session");
  ops.clear();
  const Api api(slots);
  const Bundle bundle(options.at("attncompile.bundle"));
  const auto shared = std::make_shared<const Bundle>(options.at("attncompile.bundle"));
  const Call& call = *shared->calls().front();
  Op op(shared, call, "CUDAExecutionProvider", Norms(api, nullptr, version));
  const Info info{"node", record};
  std::vector<void*> kernels(3);
  for (void*& kernel : kernels)
    if (!take(op.create(&op, slots, reinterpret_cast<const OrtKernelInfo*>(&info), &kernel)).empty()) return 1;
  std::atomic<int> wrong{0};
  std::vector<std::thread> all;
  const long before = cuda.get<long()>("double_launched")();
  for (int t = 0; t < 8; ++t)
    all.emplace_back([&, t] {
      const auto current = cuda.get<void(void*, void*)>("double_current");
      current(reinterpret_cast<void*>(0xC0), reinterpret_cast<void*>(0xC0 + static_cast<std::intptr_t>(t % 3)));
      Context context = context_of(&op);
      for (int i = 0; i < 200; ++i)
        for (void* kernel : kernels)
          if (!take(op.compute(kernel, reinterpret_cast<OrtKernelContext*>(&context))).empty()) ++wrong;
    });
  for (std::thread& thread : all) thread.join();
  if (wrong != 0) return bad_result("runs in threads fail");
  if (cuda.get<long()>("double_launched")() - before != 8 * 200 * 3) return bad_result("launches are missing");
  for (void* kernel : kernels) op.destroy(kernel);
  const long loaded = cuda.get<long()>("double_loaded")();
  std::cout << "modules " << loaded << "\n";
  if (loaded != cuda.get<long()>("double_unloaded")()) return bad_result("modules are not unloaded");
  return 0;
}

// What is said by versions of ONNX Runtime, with and without the entry that confirms strict mode: of the registration,
// and, where that succeeds, of a node that says nothing and of one that says that its model has norms in float16.
int norms(const std::string& record) {
  for (const char* given : {"1.23.2", "1.26.0", "1.27.0", "1.100.1", "2.0.0", "nightly"})
    for (const std::string entry : {"", "0", "1"}) {
      version = given;
      options.erase("attncompile.strict_norms");
      if (!entry.empty()) options["attncompile.strict_norms"] = entry;
      std::string said = take(RegisterCustomOps(nullptr, &base));
      std::cout << given << "|" << entry << "|" << said;
      for (const bool strict : {false, true}) {
        if (!said.empty()) break;
        const Info info{"node", record, strict};
        void* kernel = nullptr;
        const CustomOp* op = ops_of.at(added).front();
        std::cout << "|" << take(op->create(op, slots, reinterpret_cast<const OrtKernelInfo*>(&info), &kernel));
        if (kernel != nullptr) op->destroy(kernel);
      }
      std::cout << "\n";
    }
  return statuses == 0 ? 0 : bad_result("statuses are not released");
}

#ifdef COUNT_ALLOCATIONS
int allocations_of_runs(const std::string& record) {
  take(RegisterCustomOps(nullptr, &base));
  for (const CustomOp* op : ops) {
    const Info info{"node", record};
    void* kernel = nullptr;
    if (!take(op->create(op, slots, reinterpret_cast<const OrtKernelInfo*>(&info), &kernel)).empty()) return 1;
    Context context = context_of(op);
    const long before = allocations;
    for (int i = 0; i < 1000; ++i)
      if (op->compute(kernel, reinterpret_cast<OrtKernelContext*>(&context)) != nullptr) return bad_result("a run");
    const long made = allocations - before;  // before the first text, for which a buffer is allocated
    std::cout << "allocations in 1000 runs: " << made << ", before: " << before << "\n";
    if (made != 0 || before == 0) return 1;
    op->destroy(kernel);
  }
  return ops.empty() ? bad_result("no op") : 0;
}
#endif

}  // namespace

// MODE FOLDER RECORD: the files of one bundle and the attribute of a node of its calls.
int main(int count, char** given) {
  if (count != 4) return 2;
  fill();
  const std::string mode = given[1], folder = given[2], record = slurped(given[3]);
  options["attncompile.bundle"] = folder;
  const Double cuda{dlopen(std::getenv("ATTNCOMPILE_LIBCUDA"), RTLD_NOW)};
  if (cuda.library == nullptr) return bad_result("no double");
  cuda.get<void()>("double_reset")();
  const Bundle bundle(folder);
  for (const auto& call : bundle.calls()) {
    std::string kinds;
    for (const Argument& argument : call->entries.front()->arguments) kinds += argument.kind == Argument::int32 ? 'i' : 'p';
    cuda.get<void(const char*, const char*)>("double_entry")(call->entries.front()->name.c_str(), kinds.c_str());
  }
  if (mode == "inject") return inject(cuda, record);
  if (mode == "fuzz") return fuzz(folder, record);
  if (mode == "threads") return threads(cuda, record);
  if (mode == "norms") return norms(record);
#ifdef COUNT_ALLOCATIONS
  if (mode == "allocations") return allocations_of_runs(record);
#endif
  return 2;
}
