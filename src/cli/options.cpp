// Reading and checking the shared options.
#include "cli/options.h"

#include "core/check.h"

#include <CLI/CLI.hpp>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

namespace mla {

std::unique_ptr<Device> MachineOptions::open() const {
  if (threads < 0 || threads > 1024) fail_input("--threads is {}; give 1 to 1024, or 0 for all processors", threads);
  if (device == "cpu") return make_cpu(threads);
  int index = 0;
  if (device.starts_with("cuda:")) {
    const char* end = device.data() + device.size();
    const auto [at, problem] = std::from_chars(device.data() + 5, end, index);
    if (problem == std::errc() && at == end && index >= 0) return make_cuda(index);
  }
  if (device != "cuda") fail_input("--device is \"{}\"; give cpu, cuda or cuda:N", device);
  return make_cuda(0);
}

DType parse_kv_type(const std::string& name) {
  const auto type = parse_dtype(name);
  if (type && (*type == DType::bf16 || *type == DType::f16 || *type == DType::f32 || *type == DType::i8 || *type == DType::f8))
    return *type;
  fail_input("--kv-type is \"{}\"; give bf16, f16, f32, i8 or fp8", name);
}

DType ModelOptions::kv_type() const { return parse_kv_type(kv_type_name); }

MlaForm ModelOptions::form() const {
  if (attention_name == "auto") return MlaForm::automatic;
  if (attention_name == "absorbed") return MlaForm::absorbed;
  if (attention_name == "expanded") return MlaForm::expanded;
  fail_input("--attention is \"{}\"; give auto, absorbed or expanded", attention_name);
}

Activations ModelOptions::activations() const {
  if (activations_name == "i8") return Activations::i8;
  if (activations_name == "i16") return Activations::i16;
  fail_input("--activations is \"{}\"; give i8 or i16", activations_name);
}

void add_model_path(CLI::App& command, std::string& path, const std::string& what) {
  command.add_option("MODEL", path, what)->required()->group("arguments");
}

void add_machine_options(CLI::App& command, MachineOptions& options) {
  command.add_option("-t,--threads", options.threads, "threads to compute with (default: all processors)")
      ->option_text("N")
      ->group("machine");
  command.add_option("--device", options.device, "cpu, cuda or cuda:N (default: cpu)")->option_text("DEVICE")->group("machine");
}

void add_kv_type(CLI::App& command, std::string& name) {
  command.add_option("--kv-type", name, "type of the cache's rows: bf16, f16, f32, i8 or fp8 (default: bf16)")
      ->option_text("TYPE")
      ->group("machine");
}

void add_model_options(CLI::App& command, ModelOptions& options, bool with_context) {
  add_model_path(command, options.path);
  add_machine_options(command, options.machine);
  add_kv_type(command, options.kv_type_name);
  if (with_context)
    command.add_option("--context", options.context, "tokens the cache has room for, over all prompts (default: what is needed)")
        ->option_text("N")
        ->group("machine");
  command
      .add_option("--attention", options.attention_name,
                  "form of latent attention: auto, absorbed or expanded (default: auto, the cheaper)")
      ->option_text("FORM")
      ->group("machine");
  command
      .add_option("--activations", options.activations_name,
                  fmt::format("what meets quantised weights: i8, or i16 at about twice the time (default: {})", options.activations_name))
      ->option_text("TYPE")
      ->group("machine");
  command.add_option("--dump", options.dump, "write every named intermediate of the forward passes to a .safetensors file")
      ->option_text("FILE")
      ->group("machine");
}

void add_json(CLI::App& command, bool& json) {
  command.add_flag("--json", json, "print one JSON object on stdout and nothing else there")->group("output");
}

void add_sampling_options(CLI::App& command, SamplingArguments& a) {
  const std::string group = "sampling";
  SamplingOptions& s = a.sampling;
  command
      .add_option("--temperature", s.temperature, fmt::format("0 takes the likeliest token; more is freer (default: {})", s.temperature))
      ->option_text("X")
      ->group(group);
  command.add_option("--top-k", s.top_k, "choose among the K likeliest tokens")->option_text("K")->group(group);
  command.add_option("--top-p", s.top_p, "choose among the likeliest tokens that have the share P of the probability")
      ->option_text("P")
      ->group(group);
  command.add_option("--min-p", s.min_p, "leave out tokens less likely than P times the likeliest")->option_text("P")->group(group);
  command.add_option("--repetition-penalty", s.repetition_penalty, "above 1, tokens that are there already become less likely")
      ->option_text("X")
      ->group(group);
  command.add_option("--logit-bias", a.biases, "add BIAS to the logit of token ID; may be repeated")
      ->option_text("ID=BIAS")
      ->expected(1)
      ->take_all()
      ->group(group);
  command.add_option("--seed", s.seed, "the same seed gives the same text (default: 0)")->option_text("S")->group(group);
  command.add_option("--stop", a.stops, "end before this text; may be repeated")
      ->option_text("TEXT")
      ->expected(1)
      ->take_all()
      ->group(group);
}

SamplingOptions SamplingArguments::read() const {
  SamplingOptions out = sampling;
  for (const std::string& bias : biases) {
    const size_t equals = bias.find('=');
    int32_t id = -1;
    float value = 0;
    const char* end = bias.data() + bias.size();
    const auto [at, problem] = std::from_chars(bias.data(), end, id);
    const bool number = equals != std::string::npos && problem == std::errc() && at == bias.data() + equals;
    const auto [at_value, problem_value] =
        number ? std::from_chars(at + 1, end, value) : std::from_chars_result{end, std::errc::invalid_argument};
    if (!number || problem_value != std::errc() || at_value != end) fail_input("--logit-bias is \"{}\"; give ID=BIAS, as in 42=-5", bias);
    out.logit_bias.emplace_back(id, value);
  }
  return out;
}

void check_output(const std::string& path, const char* option) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const fs::path folder = fs::absolute(path).parent_path();
  if (!fs::is_directory(folder, ignored)) fail_input("{} is {}, and there is no folder {}; make it first", option, path, folder.string());
  const fs::file_status status = fs::status(path, ignored);
  if (fs::exists(status) && !fs::is_regular_file(status))
    fail_input("{} is {}, which is there and no file; give another name", option, path);
}

std::string read_file(const std::string& path) {
  std::ostringstream text;
  if (path == "-") {
    text << std::cin.rdbuf();
    return text.str();
  }
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) fail_input("{} is a folder; give a text file, or - for stdin", path);
  std::ifstream file(path, std::ios::binary);
  if (!file) fail_input("cannot read {}: {}", path, std::strerror(errno));
  text << file.rdbuf();
  return text.str();
}

}  // namespace mla
