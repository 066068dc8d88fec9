// The functions of the CUDA driver that a launch needs, found at run time: no toolkit is needed to build this.
#pragma once
#include <cstddef>
#include <string>

namespace attncompile {

using Handle = void*;  // of a context, a module, a function, a stream

class Driver {
 public:
  // The library, started: ATTNCOMPILE_LIBCUDA, else libcuda.so.1. Throws Error: there is none, it does not start, or it
  // is too old. A failure is not remembered.
  static const Driver& get();

  Handle current_context() const;
  // Makes a context current in this thread for as long as it lives.
  class Within;

  int capability() const;       // of the current context's device, major * 10 + minor
  int shared_limit() const;     // bytes of shared memory that one block can have
  int multiprocessors() const;
  unsigned long long context_id(Handle context) const;  // tells a context from one that had its address; 0: not told

  Handle load(const char* code) const;  // a cubin, or PTX that ends in a zero byte
  void unload(Handle module) const noexcept;
  Handle function(Handle module, const char* name) const;
  void allow_shared(Handle function, int bytes) const;
  void make_current(Handle context) const;
  // The driver's code, 0 if all is well: no Error is made of it on the way.
  int launch(Handle function, const unsigned (&grid)[3], unsigned threads, unsigned shared, Handle stream,
             void** arguments) const noexcept;
  [[noreturn]] void raise(const char* function, int code, const std::string& said = "") const;

 private:
  Driver();
  void check(int code, const char* function) const;
  int attribute(int which) const;

  void* library_ = nullptr;
  int version_ = 0;
  int (*init_)(unsigned) = nullptr;
  int (*get_version_)(int*) = nullptr;
  int (*get_current_)(Handle*) = nullptr;
  int (*set_current_)(Handle) = nullptr;
  int (*push_)(Handle) = nullptr;
  int (*pop_)(Handle*) = nullptr;
  int (*get_id_)(Handle, unsigned long long*) = nullptr;
  int (*synchronize_)() = nullptr;
  int (*get_device_)(int*) = nullptr;
  int (*get_attribute_)(int*, int, int) = nullptr;
  int (*load_)(Handle*, const void*, unsigned, int*, void**) = nullptr;
  int (*unload_)(Handle) = nullptr;
  int (*get_function_)(Handle*, Handle, const char*) = nullptr;
  int (*set_attribute_)(Handle, int, int) = nullptr;
  int (*launch_)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                 void**) = nullptr;
  int (*error_name_)(int, const char**) = nullptr;
  int (*error_text_)(int, const char**) = nullptr;
};

class Driver::Within {
 public:
  Within(const Driver& driver, Handle context) : driver_(driver), pushed_(driver.push_(context) == 0) {}
  ~Within() {
    Handle popped = nullptr;
    if (pushed_) driver_.pop_(&popped);
  }
  Within(const Within&) = delete;
  Within& operator=(const Within&) = delete;
  bool entered() const { return pushed_; }
  void wait() const { driver_.synchronize_(); }

 private:
  const Driver& driver_;
  bool pushed_;
};

}  // namespace attncompile
