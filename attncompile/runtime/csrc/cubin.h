// The outer form of a cubin, an ELF file of 64 bits. The driver trusts it: given one that is cut off, it crashes.
#pragma once
#include <string_view>

namespace attncompile {

// Throws Error unless `data` is an ELF file for CUDA, all of whose parts lie inside it.
void check_cubin(std::string_view data);

}  // namespace attncompile
