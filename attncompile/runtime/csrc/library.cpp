// RegisterCustomOps: one custom op for each call of a bundle, with exactly its tensors and their types, so that ONNX
// Runtime itself refuses a node of other types, and a new mechanism needs no line here.
#include <dlfcn.h>
#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bundle.h"
#include "error.h"
#include "kernel.h"
#include "ort.h"

namespace attncompile {
namespace {

constexpr const char* kDomain = "attncompile.kernels";
constexpr const char* kProvider = "CUDAExecutionProvider";
constexpr const char* kBundleKey = "attncompile.bundle";              // session option: the folder of the bundle
constexpr const char* kStrictKey = "attncompile.strict_norms";        // session option: "1" if the provider has strict mode
constexpr const char* kStrict = "strict_norms";                       // attribute of nodes of models that need it
constexpr const char* kProviderVariable = "ATTNCOMPILE_TEST_PROVIDER";  // for tests on machines without a GPU

// Runs `what`; whatever it throws becomes a status.
template <typename What>
OrtStatus* guarded(const Api& api, What what) noexcept {
  try {
    what();
    return nullptr;
  } catch (const Error& error) {
    return api.status(error.code(), error.what());
  } catch (const std::exception& error) {
    return api.status(Code::fail, error.what());
  } catch (...) {
    return api.status(Code::fail, "an unknown error in attncompile's kernels");
  }
}

void expect(const Api& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string text = api.message(status);
  api.release(status);
  throw Error(text, "");
}

// A text that is asked for twice: for its size, then for itself.
template <typename Get>
std::string text_of(const Api& api, Get get) {
  std::size_t size = 0;
  expect(api, get(nullptr, &size));
  std::string out(size, '\0');
  expect(api, get(out.data(), &size));
  while (!out.empty() && out.back() == '\0') out.pop_back();
  return out;
}

bool has_attribute(const Api& api, const OrtKernelInfo* info, const char* name) {
  std::size_t size = 0;
  OrtStatus* status = api.attribute(info, name, nullptr, &size);
  if (status == nullptr) return true;
  api.release(status);
  return false;
}

// Norms of sums in float16, beside kernels of this library. Before 1.27 ONNX Runtime's CUDA provider adds up their squares
// in float16 unless it is in strict mode, which no library can ask it: whoever registers this one says so.
class Norms {
 public:
  Norms(const Api& api, const OrtSessionOptions* options, const char* version) : version_(version) {
    int major = 0, minor = 0, said = 0;
    if (std::sscanf(version, "%d.%d", &major, &minor) == 2 && std::make_pair(major, minor) >= std::make_pair(1, 27)) return;
    expect(api, api.has_config(options, kStrictKey, &said));
    exact_ = said != 0 && text_of(api, [&](char* to, std::size_t* size) {
               return api.config(options, kStrictKey, to, size);
             }) == "1";
  }

  bool exact() const { return exact_; }

  // Throws unless they are right here.
  void require(const std::string& where) const {
    if (exact_) return;
    throw Error(where + ": the model has norms of sums in float16, and ONNX Runtime " + version_ +
                    " adds up their squares in float16",
                "give its CUDA provider enable_skip_layer_norm_strict_mode=1 and the session options the entry " +
                    std::string(kStrictKey) + "=1, before this library is registered; or take ONNX Runtime 1.27 or "
                    "later; or compile the model again with --no-half-norms, unless it came with such norms");
  }

 private:
  std::string version_;
  bool exact_ = true;
};

struct Op : CustomOp {
  Op(std::shared_ptr<const Bundle> of, const Call& its, const std::string& where, const Norms& norms_here)
      : bundle(std::move(of)), call(its), title(its.op + "_" + its.key), runs_on(where), norms(norms_here) {
    name = [](const CustomOp* op) { return self(op).title.c_str(); };
    provider = [](const CustomOp* op) { return self(op).runs_on.c_str(); };
    input_type = [](const CustomOp* op, std::size_t i) { return self(op).call.inputs[i].type; };
    input_count = [](const CustomOp* op) { return self(op).call.inputs.size(); };
    output_type = [](const CustomOp* op, std::size_t i) { return self(op).call.outputs[i].type; };
    output_count = [](const CustomOp* op) { return self(op).call.outputs.size(); };
    input_characteristic = [](const CustomOp*, std::size_t) { return 0; };  // required
    output_characteristic = [](const CustomOp*, std::size_t) { return 0; };
    input_memory = [](const CustomOp*, std::size_t) { return 0; };  // the provider's own
    variadic_input_arity = variadic_input_alike = variadic_output_arity = variadic_output_alike =
        [](const CustomOp*) { return 1; };
    start_version = [](const CustomOp*) { return 1; };
    end_version = [](const CustomOp*) { return 0x7fffffff; };
    create = create_kernel_of;
    compute = [](void* kernel, OrtKernelContext* context) {
      auto& made = *static_cast<Made*>(kernel);
      return guarded(made.api, [&] { made.kernel.run(context); });
    };
    destroy = [](void* kernel) { delete static_cast<Made*>(kernel); };
  }

  struct Made {
    Api api;
    Kernel kernel;
  };

  static const Op& self(const CustomOp* op) { return *static_cast<const Op*>(op); }

  static OrtStatus* create_kernel_of(const CustomOp* op, Slots slots, const OrtKernelInfo* info, void** out) {
    const Api api(slots);
    return guarded(api, [&] {
      const Op& its = self(op);
      std::string node = text_of(api, [&](char* to, std::size_t* size) { return api.node_name(info, to, size); });
      if (node.empty()) node = its.title;
      std::string record;
      try {
        record = text_of(api, [&](char* to, std::size_t* size) { return api.attribute(info, "launch", to, size); });
      } catch (const Error&) {
        throw Error(node + ": it has no attribute 'launch'", "load the model that compile wrote for onnxruntime-cuda");
      }
      if (!its.norms.exact() && has_attribute(api, info, kStrict)) its.norms.require(node);  // the bundle is of another
      *out = new Made{api, {api, its.bundle, its.call, std::move(node), record}};
    });
  }

  std::shared_ptr<const Bundle> bundle;
  const Call& call;
  std::string title, runs_on;
  Norms norms;
};

// A bundle as it was when it was read, with its ops. Lives as long as this library is loaded.
struct Registered {
  std::string key;
  std::vector<std::unique_ptr<Op>> ops;
  OrtCustomOpDomain* domain = nullptr;
  Api api;
};

struct Registry {
  std::mutex mutex;
  std::vector<Registered> all;
};

// Sessions may outlive the statics of a library when a process ends; then what they use is left alone.
Registry& registry() {
  static auto* const found = new Registry();
  static const struct AtEnd {
    ~AtEnd() {
      if (Kernel::alive() != 0) return;
      for (Registered& one : found->all) one.api.release_domain(one.domain);
      delete found;
    }
  } at_end;
  return *found;
}

// Beside this library.
std::string default_folder() {
  Dl_info info{};
  std::string path;
  if (dladdr(reinterpret_cast<const void*>(&default_folder), &info) != 0 && info.dli_fname != nullptr)
    path = info.dli_fname;
  const std::size_t slash = path.rfind('/');
  return (slash == std::string::npos ? "." : path.substr(0, slash)) + "/bundle";
}

std::string folder_of(const Api& api, const OrtSessionOptions* options) {
  int given = 0;
  expect(api, api.has_config(options, kBundleKey, &given));
  if (given == 0) return default_folder();
  return text_of(api, [&](char* to, std::size_t* size) { return api.config(options, kBundleKey, to, size); });
}

// Tells a bundle from one that was written to its place later.
std::string identity(const std::string& folder, const std::string& provider) {
  struct stat s {};
  if (stat((folder + "/bundle.json").c_str(), &s) != 0) s = {};
  std::string out = folder + "|" + provider;
  for (const long long part : {static_cast<long long>(s.st_dev), static_cast<long long>(s.st_ino),
                               static_cast<long long>(s.st_size), static_cast<long long>(s.st_mtim.tv_sec),
                               static_cast<long long>(s.st_mtim.tv_nsec)})
    out += "|" + std::to_string(part);
  return out;
}

Registered opened(const Api& api, const std::string& folder, const std::string& provider, const Norms& norms,
                  std::string key) {
  Registered out;
  out.key = std::move(key);
  out.api = api;
  const auto bundle = std::make_shared<const Bundle>(folder);
  if (bundle->strict_norms()) norms.require(bundle->index());
  expect(api, api.create_domain(kDomain, &out.domain));
  for (const auto& call : bundle->calls()) {
    if (call->entries.empty()) continue;
    out.ops.push_back(std::make_unique<Op>(bundle, *call, provider, norms));
    OrtStatus* status = api.add_op(out.domain, out.ops.back().get());
    if (status != nullptr) api.release_domain(out.domain);
    expect(api, status);
  }
  return out;
}

void add(const Api& api, OrtSessionOptions* options, const char* version) {
  const char* given = std::getenv(kProviderVariable);
  const std::string provider = given != nullptr && *given != '\0' ? given : kProvider;
  const std::string folder = folder_of(api, options);
  const Norms norms(api, options, version);
  std::string key = identity(folder, provider) + (norms.exact() ? "|" : "|" + std::string(version));
  Registry& known = registry();
  const std::lock_guard<std::mutex> lock(known.mutex);
  for (const Registered& one : known.all)
    if (one.key == key) return expect(api, api.add_domain(options, one.domain));
  known.all.push_back(opened(api, folder, provider, norms, std::move(key)));
  expect(api, api.add_domain(options, known.all.back().domain));
}

}  // namespace
}  // namespace attncompile

extern "C" __attribute__((visibility("default"))) attncompile::OrtStatus* RegisterCustomOps(
    attncompile::OrtSessionOptions* options, const attncompile::OrtApiBase* base) {
  using namespace attncompile;
  const Slots slots = base->get_api(kApiVersion);
  if (slots == nullptr)
    return Api(base->get_api(1)).status(Code::not_implemented, "attncompile's kernels need ONNX Runtime 1.23 or later");
  const Api api(slots);
  return guarded(api, [&] { add(api, options, base->get_version()); });
}
