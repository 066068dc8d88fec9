#include "cubin.h"

#include <cstdint>
#include <cstring>
#include <string>

#include "error.h"

namespace attncompile {
namespace {

constexpr std::size_t kHeader = 64, kSection = 64, kSegment = 56;
constexpr std::uint16_t kCuda = 190;
constexpr std::uint32_t kEmpty = 0, kNoBits = 8;

[[noreturn]] void damaged(const std::string& reason) {
  throw Error("the cubin is damaged: " + reason, "build the bundle again");
}

template <typename Number>
Number number_at(std::string_view data, std::size_t place) {
  Number found;
  std::memcpy(&found, data.data() + place, sizeof found);
  return found;
}

void inside(std::string_view data, std::uint64_t start, std::uint64_t size) {
  if (start > data.size() || size > data.size() - start)
    damaged("it is cut off after " + std::to_string(data.size()) + " bytes");
}

}  // namespace

void check_cubin(std::string_view data) {
  if (data.size() < kHeader || data.substr(0, 5) != std::string_view("\x7f" "ELF\x02", 5)) damaged("it is no ELF file");
  if (number_at<std::uint16_t>(data, 18) != kCuda) damaged("it is not for CUDA");
  const auto segments = number_at<std::uint64_t>(data, 32), sections = number_at<std::uint64_t>(data, 40);
  const std::size_t segment_size = number_at<std::uint16_t>(data, 54), segment_count = number_at<std::uint16_t>(data, 56);
  const std::size_t section_size = number_at<std::uint16_t>(data, 58), section_count = number_at<std::uint16_t>(data, 60);
  if ((segment_count && segment_size != kSegment) || (section_count && section_size != kSection))
    damaged("its tables have another form");
  inside(data, segments, segment_size * segment_count);
  inside(data, sections, section_size * section_count);
  for (std::size_t i = 0; i < section_count; ++i) {
    const std::size_t at = sections + i * section_size;
    const auto kind = number_at<std::uint32_t>(data, at + 4);
    if (kind != kEmpty && kind != kNoBits)
      inside(data, number_at<std::uint64_t>(data, at + 24), number_at<std::uint64_t>(data, at + 32));
  }
  for (std::size_t i = 0; i < segment_count; ++i) {
    const std::size_t at = segments + i * segment_size;
    inside(data, number_at<std::uint64_t>(data, at + 8), number_at<std::uint64_t>(data, at + 32));
  }
}

}  // namespace attncompile
