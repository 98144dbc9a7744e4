// Reads /proc.
#include "cli/machine.h"

#include "core/memory.h"

#include <filesystem>
#include <fstream>
#include <sstream>

namespace mla {
namespace {

// The value after "name :" in a file of such lines; empty when there is none.
std::string entry(const std::string& file, const std::string& name) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(name)) continue;
    const size_t colon = line.find(':');
    const size_t begin = colon == std::string::npos ? colon : line.find_first_not_of(" \t", colon + 1);
    if (begin != std::string::npos) return line.substr(begin);
  }
  return {};
}

double kilobytes(const std::string& name) {
  std::istringstream text(entry("/proc/meminfo", name));
  double kb = 0;
  text >> kb;
  return 1024 * kb;
}

}  // namespace

SystemMemory memory() { return {kilobytes("MemTotal"), host_memory().free_bytes()}; }

std::string processor_name() {
  const std::string name = entry("/proc/cpuinfo", "model name");
  return name.empty() ? "unknown processor" : name;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  std::istringstream flags(entry("/proc/cpuinfo", "flags"));
  for (std::string flag; flags >> flag;)
    for (const char* wanted :
         {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"})
      if (flag == wanted) found.push_back(flag);
  return found;
}

std::vector<std::string> graphics_processors() {
  std::vector<std::string> found;
  std::error_code error;
  for (const auto& gpu : std::filesystem::directory_iterator("/proc/driver/nvidia/gpus", error)) {
    const std::string name = entry(gpu.path() / "information", "Model");
    found.push_back(name.empty() ? "NVIDIA GPU" : name);
  }
  return found;
}

}  // namespace mla
