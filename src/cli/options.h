// Options that several commands share.
#pragma once

#include "model/generate.h"

#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace mla {

// Where and how a model runs. The strings are as typed; check() reads them.
struct MachineOptions {
  int threads = 0;  // 0: all processors
  std::string device = "cpu";

  std::unique_ptr<Device> open() const;
};

struct ModelOptions {
  std::string path;
  MachineOptions machine;
  std::string kv_type_name = "bf16", attention_name = "auto", activations_name = "i8";
  int64_t context = 0;  // tokens the cache has room for; 0: as many as the work needs
  std::string dump;     // a .safetensors file for the intermediates; empty: none

  DType kv_type() const;
  MlaForm form() const;
  Activations activations() const;
};

void add_model_path(CLI::App& command, std::string& path, const std::string& what = "a Hugging Face folder or a GGUF file");
void add_machine_options(CLI::App& command, MachineOptions& options);
void add_kv_type(CLI::App& command, std::string& name);
// The path and all of the above; what `options` holds are the defaults.
void add_model_options(CLI::App& command, ModelOptions& options, bool with_context = true);
void add_json(CLI::App& command, bool& json);

DType parse_kv_type(const std::string& name);

// The options of sampling as typed.
struct SamplingArguments {
  SamplingOptions sampling;
  std::vector<std::string> biases;  // ID=BIAS
  std::vector<std::string> stops;

  SamplingOptions read() const;  // with the biases
};

void add_sampling_options(CLI::App& command, SamplingArguments& arguments);

// Before any work: a file can be put there. Files are renamed into place, which must not replace a device or a pipe.
void check_output(const std::string& path, const char* option);

std::string read_file(const std::string& path);  // "-": stdin; raises Error

}  // namespace mla
