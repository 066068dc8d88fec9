// The part of ONNX Runtime's C interface that a custom op needs, written from its published layout: a table of function
// pointers that only grows (a slot never moves), and the struct OrtCustomOp. No header of ONNX Runtime is needed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace attncompile {

constexpr std::uint32_t kApiVersion = 22;  // ONNX Runtime 1.22; every later one offers it

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorInfo;

using Slots = const void* const*;

struct OrtApiBase {
  Slots (*get_api)(std::uint32_t version);
  const char* (*get_version)();
};

// ORT_FAIL, ORT_INVALID_ARGUMENT, ORT_NOT_IMPLEMENTED
enum class Code : int { fail = 1, invalid_argument = 2, not_implemented = 9 };

// Function pointers by slot, with their types.
class Api {
 public:
  Api() = default;
  explicit Api(Slots slots) : slots_(slots) {}

  OrtStatus* status(Code code, const char* text) const {
    return at<OrtStatus*(int, const char*)>(0)(static_cast<int>(code), text);
  }
  const char* message(const OrtStatus* status) const { return at<const char*(const OrtStatus*)>(2)(status); }
  void release(OrtStatus* status) const { at<void(OrtStatus*)>(93)(status); }

  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** out) const {
    return at<OrtStatus*(const char*, OrtCustomOpDomain**)>(26)(name, out);
  }
  OrtStatus* add_op(OrtCustomOpDomain* domain, const void* op) const {
    return at<OrtStatus*(OrtCustomOpDomain*, const void*)>(27)(domain, op);
  }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return at<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }
  void release_domain(OrtCustomOpDomain* domain) const { at<void(OrtCustomOpDomain*)>(101)(domain); }
  OrtStatus* has_config(const OrtSessionOptions* options, const char* key, int* out) const {
    return at<OrtStatus*(const OrtSessionOptions*, const char*, int*)>(237)(options, key, out);
  }
  // `size` holds the room in `out` and then what is needed, both with the zero at the end.
  OrtStatus* config(const OrtSessionOptions* options, const char* key, char* out, std::size_t* size) const {
    return at<OrtStatus*(const OrtSessionOptions*, const char*, char*, std::size_t*)>(238)(options, key, out, size);
  }

  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, char* out, std::size_t* size) const {
    return at<OrtStatus*(const OrtKernelInfo*, const char*, char*, std::size_t*)>(87)(info, name, out, size);
  }
  OrtStatus* node_name(const OrtKernelInfo* info, char* out, std::size_t* size) const {
    return at<OrtStatus*(const OrtKernelInfo*, char*, std::size_t*)>(244)(info, out, size);
  }

  OrtStatus* input(const OrtKernelContext* context, std::size_t index, const OrtValue** out) const {
    return at<OrtStatus*(const OrtKernelContext*, std::size_t, const OrtValue**)>(90)(context, index, out);
  }
  OrtStatus* output(OrtKernelContext* context, std::size_t index, const std::int64_t* sizes, std::size_t axes,
                    OrtValue** out) const {
    using Type = OrtStatus*(OrtKernelContext*, std::size_t, const std::int64_t*, std::size_t, OrtValue**);
    return at<Type>(91)(context, index, sizes, axes, out);
  }
  OrtStatus* stream(const OrtKernelContext* context, void** out) const {
    return at<OrtStatus*(const OrtKernelContext*, void**)>(193)(context, out);
  }
  OrtStatus* data(const OrtValue* value, void** out) const {
    return at<OrtStatus*(const OrtValue*, void**)>(51)(value, out);
  }
  OrtStatus* tensor_info(const OrtValue* value, OrtTensorInfo** out) const {
    return at<OrtStatus*(const OrtValue*, OrtTensorInfo**)>(65)(value, out);
  }
  void release(OrtTensorInfo* info) const { at<void(OrtTensorInfo*)>(99)(info); }
  OrtStatus* axes(const OrtTensorInfo* info, std::size_t* out) const {
    return at<OrtStatus*(const OrtTensorInfo*, std::size_t*)>(61)(info, out);
  }
  OrtStatus* sizes(const OrtTensorInfo* info, std::int64_t* out, std::size_t axes) const {
    return at<OrtStatus*(const OrtTensorInfo*, std::int64_t*, std::size_t)>(62)(info, out, axes);
  }

 private:
  template <typename Function>
  Function* at(std::size_t slot) const {
    // The table holds functions as pointers to const void.
    return reinterpret_cast<Function*>(const_cast<void*>(slots_[slot]));
  }

  Slots slots_ = nullptr;
};

// struct OrtCustomOp: a version, then functions in this order.
struct CustomOp {
  std::uint32_t version = kApiVersion;
  void* (*create_kernel)(const CustomOp*, Slots, const OrtKernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*provider)(const CustomOp*) = nullptr;
  int (*input_type)(const CustomOp*, std::size_t) = nullptr;
  std::size_t (*input_count)(const CustomOp*) = nullptr;
  int (*output_type)(const CustomOp*, std::size_t) = nullptr;
  std::size_t (*output_count)(const CustomOp*) = nullptr;
  void (*compute_v1)(void*, OrtKernelContext*) = nullptr;
  void (*destroy)(void*) = nullptr;
  int (*input_characteristic)(const CustomOp*, std::size_t) = nullptr;
  int (*output_characteristic)(const CustomOp*, std::size_t) = nullptr;
  int (*input_memory)(const CustomOp*, std::size_t) = nullptr;
  int (*variadic_input_arity)(const CustomOp*) = nullptr;
  int (*variadic_input_alike)(const CustomOp*) = nullptr;
  int (*variadic_output_arity)(const CustomOp*) = nullptr;
  int (*variadic_output_alike)(const CustomOp*) = nullptr;
  OrtStatus* (*create)(const CustomOp*, Slots, const OrtKernelInfo*, void**) = nullptr;
  OrtStatus* (*compute)(void*, OrtKernelContext*) = nullptr;
  OrtStatus* (*infer)(const CustomOp*, void*) = nullptr;
  int (*start_version)(const CustomOp*) = nullptr;
  int (*end_version)(const CustomOp*) = nullptr;
  std::size_t (*may_inplace)(int**, int**) = nullptr;
  void (*release_inplace)(int*, int*) = nullptr;
  std::size_t (*alias)(int**, int**) = nullptr;
  void (*release_alias)(int*, int*) = nullptr;
};
static_assert(sizeof(CustomOp) == 26 * sizeof(void*), "OrtCustomOp of version 22 has 26 words");

}  // namespace attncompile
