// mla doctor: is this machine, and is this model, in order?
#include "cli/doctor.h"

#include "cli/command.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/machine.h"
#include "cli/progress.h"
#include "core/check.h"
#include "core/threads.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>

namespace mla {
namespace {

using Json = nlohmann::ordered_json;

struct DoctorOptions {
  std::string path;
  MachineOptions machine;
  bool quick = false, json = false;
};

struct Machine {
  std::string device;
  Ceilings one, all;
};

std::string joined(const std::vector<std::string>& words, const char* none) {
  std::string out;
  for (const std::string& word : words) out.append(out.empty() ? "" : ", ").append(word);
  return out.empty() ? none : out;
}

Machine measure(const DoctorOptions& o) {
  Machine m;
  ProgressBar bar("probing");
  bar.update(0);
  m.one = make_cpu(1)->probe(0.4);
  const auto device = o.machine.open();
  m.all = device->probe(0.4);
  m.device = device->describe();
  return m;
}

std::string ceiling(const Machine& m, double Ceilings::*what, const char* unit) {
  if (m.all.*what == 0) return "none";
  return fmt::format("{} {}; one thread {}", rate_text(m.all.*what), unit, rate_text(m.one.*what));
}

void print_machine(const Machine& m) {
  auto line = [](const char* what, const std::string& text) { fmt::print("  {:<14}{}\n", what, text); };
  fmt::print("Machine\n\n");
  line("processor", fmt::format("{}, {} usable", processor_name(), available_processors()));
  line("instructions", joined(instruction_sets(), "none of those the kernels know"));
  line("kernels", m.device);
  line("memory", fmt::format("{}, {} free", bytes_text(memory().total_bytes), bytes_text(memory().available_bytes)));
  line("reading", ceiling(m, &Ceilings::read_gb_s, "GB/s"));
  line("int8", ceiling(m, &Ceilings::int8_gop_s, "Gop/s"));
  line("bf16", ceiling(m, &Ceilings::bf16_gflop_s, "GFLOP/s"));
  line("f32", ceiling(m, &Ceilings::f32_gflop_s, "GFLOP/s"));
  line("GPUs", joined(graphics_processors(), "none"));
}

void print_checks(const std::string& path, const std::vector<Check>& checks) {
  fmt::print("\n{}\n\n", path);
  size_t width = 0;
  for (const Check& c : checks) width = std::max(width, c.name.size());
  for (const Check& c : checks) fmt::print("  {:<7}  {:<{}}  {}\n", name(c.verdict), c.name, width, c.found);
}

Json to_json(const Ceilings& c) {
  return {{"read_gb_s", c.read_gb_s}, {"int8_gop_s", c.int8_gop_s}, {"bf16_gflop_s", c.bf16_gflop_s}, {"f32_gflop_s", c.f32_gflop_s}};
}

Json to_json(const Machine& m) {
  return {{"processor", processor_name()},        {"processors", available_processors()},
          {"instructions", instruction_sets()},   {"device", m.device},
          {"memory_bytes", memory().total_bytes}, {"memory_available_bytes", memory().available_bytes},
          {"one_thread", to_json(m.one)},         {"all_threads", to_json(m.all)},
          {"gpus", graphics_processors()}};
}

Json to_json(const std::vector<Check>& checks) {
  Json out = Json::array();
  for (const Check& c : checks) out.push_back({{"name", c.name}, {"verdict", name(c.verdict)}, {"found", c.found}});
  return out;
}

std::vector<Check> examine(const DoctorOptions& o) {
  std::vector<Check> checks;
  {
    const Checkpoint checkpoint = Checkpoint::open(o.path);
    const auto tokenizer = open_tokenizer(checkpoint);
    checks = check_files(checkpoint, read_config(checkpoint), tokenizer ? &*tokenizer : nullptr);
  }
  if (o.quick) {
    checks.push_back({"forward pass", Verdict::skipped, "--quick"});
    return checks;
  }
  if (std::any_of(checks.begin(), checks.end(), [](const Check& c) { return c.verdict == Verdict::wrong; })) {
    checks.push_back({"forward pass", Verdict::skipped, "the files come first"});
    return checks;
  }
  ModelOptions options;
  options.path = o.path;
  options.machine = o.machine;
  Session session(options);
  ProgressBar bar("running");
  for (Check& check : check_model(session, [&](double fraction) { bar.update(fraction); })) checks.push_back(std::move(check));
  return checks;
}

void doctor(const DoctorOptions& o) {
  const Machine machine = measure(o);
  if (!o.json) {
    print_machine(machine);
    std::fflush(stdout);
  }
  std::vector<Check> checks;
  if (!o.path.empty()) checks = examine(o);
  const auto wrong = std::count_if(checks.begin(), checks.end(), [](const Check& c) { return c.verdict == Verdict::wrong; });
  if (o.json)
    print_json(
        {{"machine", to_json(machine)}, {"model", o.path.empty() ? Json() : Json(o.path)}, {"checks", to_json(checks)}, {"wrong", wrong}});
  else if (!o.path.empty())
    print_checks(o.path, checks);
  std::fflush(stdout);
  if (!o.path.empty()) fmt::print(stderr, "mla: {} checks, {}\n", checks.size(), wrong ? fmt::format("{} wrong", wrong) : "all is well");
  if (wrong) fail("{} of {} checks found something wrong with {}", wrong, checks.size(), o.path);
}

}  // namespace

void add_doctor(CLI::App& program, Work& work) {
  auto o = std::make_shared<DoctorOptions>();
  CLI::App& c = add_command(program, "doctor", "check this machine, and a model for mistakes that others made with its kind",
                            "  mla doctor\n"
                            "  mla doctor model.gguf\n"
                            "  mla doctor folder --quick --json");
  c.add_option("MODEL", o->path, "a Hugging Face folder or a GGUF file")->group("arguments");
  c.add_flag("--quick", o->quick, "look at the files only; do not run the model")->group("work");
  add_machine_options(c, o->machine);
  add_json(c, o->json);
  c.final_callback([o, &work] { work = [o] { doctor(*o); }; });
}

}  // namespace mla
