// What the operating system says about this machine.
#pragma once

#include <string>
#include <vector>

namespace mla {

struct SystemMemory {
  double total_bytes = 0, available_bytes = 0;  // available: without swapping
};

SystemMemory memory();
std::string processor_name();                    // "AMD EPYC 9R14"
std::vector<std::string> instruction_sets();     // those that the kernels look for
std::vector<std::string> graphics_processors();  // as their driver names them; needs no CUDA

}  // namespace mla
