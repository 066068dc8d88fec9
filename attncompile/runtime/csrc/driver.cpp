#include "driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <optional>
#include <type_traits>

#include "error.h"

namespace attncompile {
namespace {

constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76, kMaxShared = 97;  // CUdevice_attribute
constexpr int kMaxDynamicShared = 8;                                             // CUfunction_attribute
constexpr int kErrorLog = 5, kErrorLogSize = 6;                                  // CUjit_option
constexpr std::size_t kLogSize = 4096;
constexpr int kOldest = 12000, kWanted = 12080;

constexpr const char* kUpdate = "update the NVIDIA driver: kernels need one of CUDA 12.8 or later";

std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

std::string hint_for(const std::string& name, int version) {
  if (name == "CUDA_ERROR_UNSUPPORTED_PTX_VERSION") return kUpdate;
  if (name == "CUDA_ERROR_NO_BINARY_FOR_GPU") return "compile the model for this GPU's architecture (--arch)";
  if (name == "CUDA_ERROR_INVALID_IMAGE")
    return version < kWanted ? kUpdate : "compile the model again, or update the NVIDIA driver";
  if (name == "CUDA_ERROR_OUT_OF_MEMORY") return "free memory of the GPU";
  return version < kWanted ? kUpdate : "see 'attncompile env'";
}

template <typename Function>
void find(void* library, const char* name, Function*& out, bool needed = true) {
  void* found = dlsym(library, name);
  if (found == nullptr && needed)
    throw Error(std::string("the NVIDIA driver has no ") + name, kUpdate, Code::not_implemented);
  out = reinterpret_cast<Function*>(found);
}

}  // namespace

const Driver& Driver::get() {
  // Never destroyed: sessions may outlive the statics of this library when a process ends.
  static_assert(std::is_trivially_destructible_v<Driver>);
  static std::mutex mutex;
  static std::optional<Driver> driver;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!driver) driver = Driver();
  return *driver;
}

Driver::Driver() {
  const char* given = std::getenv("ATTNCOMPILE_LIBCUDA");
  const char* name = given != nullptr && *given != '\0' ? given : "libcuda.so.1";
  library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr)
    throw Error(std::string(name) + " cannot be loaded: there is no NVIDIA driver",
                "kernels run on NVIDIA GPUs only; OUT/model.onnx runs anywhere", Code::not_implemented);
  find(library_, "cuGetErrorName", error_name_);
  find(library_, "cuGetErrorString", error_text_);
  find(library_, "cuInit", init_);
  find(library_, "cuDriverGetVersion", get_version_);
  find(library_, "cuCtxGetCurrent", get_current_);
  find(library_, "cuCtxSetCurrent", set_current_);
  find(library_, "cuCtxPushCurrent_v2", push_);
  find(library_, "cuCtxPopCurrent_v2", pop_);
  find(library_, "cuCtxGetId", get_id_, false);
  find(library_, "cuCtxSynchronize", synchronize_);
  find(library_, "cuCtxGetDevice", get_device_);
  find(library_, "cuDeviceGetAttribute", get_attribute_);
  find(library_, "cuModuleLoadDataEx", load_);
  find(library_, "cuModuleUnload", unload_);
  find(library_, "cuModuleGetFunction", get_function_);
  find(library_, "cuFuncSetAttribute", set_attribute_);
  find(library_, "cuLaunchKernel", launch_);
  check(init_(0), "cuInit");
  check(get_version_(&version_), "cuDriverGetVersion");
  if (version_ < kOldest)
    throw Error("the NVIDIA driver is too old: it is one of CUDA " + dotted(version_), kUpdate, Code::not_implemented);
}

void Driver::check(int code, const char* function) const {
  if (code != 0) raise(function, code);
}

void Driver::raise(const char* function, int code, const std::string& said) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (error_name_(code, &name) != 0 || name == nullptr) name = nullptr;
  if (error_text_(code, &text) != 0 || text == nullptr) text = nullptr;
  const std::string shown = name != nullptr ? name : "error " + std::to_string(code);
  std::string why = said;
  if (why.empty()) why = text != nullptr ? text : "error " + std::to_string(code);
  throw Error(std::string(function) + ": " + shown + " (" + why + ")", hint_for(shown, version_));
}

Handle Driver::current_context() const {
  Handle found = nullptr;
  check(get_current_(&found), "cuCtxGetCurrent");
  return found;
}

void Driver::make_current(Handle context) const { check(set_current_(context), "cuCtxSetCurrent"); }

unsigned long long Driver::context_id(Handle context) const {
  unsigned long long found = 0;
  if (get_id_ != nullptr) check(get_id_(context, &found), "cuCtxGetId");
  return found;
}

int Driver::attribute(int which) const {
  int device = 0, found = 0;
  check(get_device_(&device), "cuCtxGetDevice");
  check(get_attribute_(&found, which, device), "cuDeviceGetAttribute");
  return found;
}

int Driver::capability() const { return attribute(kMajor) * 10 + attribute(kMinor); }
int Driver::shared_limit() const { return attribute(kMaxShared); }
int Driver::multiprocessors() const { return attribute(kMultiprocessors); }

Handle Driver::load(const char* code) const {
  Handle found = nullptr;
  std::string log(kLogSize, '\0');
  int options[] = {kErrorLog, kErrorLogSize};
  void* values[] = {log.data(), reinterpret_cast<void*>(kLogSize)};
  const int failed = load_(&found, code, 2, options, values);
  if (failed == 0) return found;
  std::string said;
  for (const char c : log) {  // one line
    if (c == '\0') break;
    const bool blank = c == '\n' || c == '\r' || c == '\t' || c == ' ';
    if (!blank) said += c;
    else if (!said.empty() && said.back() != ' ') said += ' ';
  }
  raise("cuModuleLoadDataEx", failed, said);
}

void Driver::unload(Handle module) const noexcept { unload_(module); }

Handle Driver::function(Handle module, const char* name) const {
  Handle found = nullptr;
  check(get_function_(&found, module, name), "cuModuleGetFunction");
  return found;
}

void Driver::allow_shared(Handle function, int bytes) const {
  check(set_attribute_(function, kMaxDynamicShared, bytes), "cuFuncSetAttribute");
}

int Driver::launch(Handle function, const unsigned (&grid)[3], unsigned threads, unsigned shared, Handle stream,
                   void** arguments) const noexcept {
  return launch_(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, stream, arguments, nullptr);
}

}  // namespace attncompile
