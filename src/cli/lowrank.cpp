// mla lowrank: one matrix by the four factorisations, with their errors, times and the singular values behind them.
#include "cli/chart.h"
#include "cli/command.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/options.h"
#include "core/check.h"
#include "core/quant.h"
#include "core/threads.h"
#include "io/checkpoint.h"
#include "io/npy.h"
#include "io/safetensors.h"
#include "io/writer_file.h"
#include "lowrank/factor.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>

namespace mla {
namespace {

using Json = nlohmann::ordered_json;

struct LowRankOptions {
  std::string path, tensor, svg;
  int64_t rank = 0;
  int threads = 0;
  uint64_t seed = 0;
  bool json = false;
};

struct Tried {
  Method method;
  double error;  // ‖W − up down‖_F / ‖W‖_F
  double seconds;
};

Matrix decoded(const Tensor& t) {
  std::vector<float> values(size_t(t.count()));
  dequantise(t, values.data());
  Matrix w(t.shape[0], t.shape[1]);
  std::copy(values.begin(), values.end(), w.data.begin());
  return w;
}

Matrix from_safetensors(const std::string& path, const std::string& name) {
  const MappedFile file(path);
  std::string matrices;
  for (const ListedTensor& t : parse_safetensors({file.data(), file.size()}, path)) {
    if (t.shape.size() != 2 || !t.dtype) continue;
    if (t.name == name && t.dtype == DType::f8) fail_input("{} is fp8, with its scales elsewhere; name the model's folder", name);
    if (t.name == name) return decoded(view(const_cast<std::byte*>(file.data()) + t.begin, *t.dtype, {t.shape[0], t.shape[1]}));
    if (matrices.size() < 200) matrices += (matrices.empty() ? "" : ", ") + t.name;
  }
  fail_input("{} has no matrix \"{}\"; --tensor may be {}", path, name, matrices.empty() ? "nothing: it holds no matrices" : matrices);
}

Matrix from_model(const std::string& path, const std::string& name) {
  const Checkpoint checkpoint = Checkpoint::open(path);
  const Tensor& t = checkpoint.get(name).value;
  if (t.rank != 2) fail_input("{} is {}; only matrices can be factorised", name, describe(t));
  return decoded(t);
}

Matrix read_matrix(const LowRankOptions& o) {
  const auto extension = std::filesystem::path(o.path).extension();
  if (extension == ".npy") {
    if (!o.tensor.empty()) fail_input("--tensor is \"{}\", but a .npy file holds one matrix; leave it out", o.tensor);
    NpyMatrix read = read_npy_matrix(o.path);
    Matrix w;
    w.rows = read.rows, w.cols = read.cols, w.data = std::move(read.values);
    return w;
  }
  if (o.tensor.empty()) fail_input("--tensor is missing; it names the matrix in {}", o.path);
  return extension == ".safetensors" ? from_safetensors(o.path, o.tensor) : from_model(o.path, o.tensor);
}

std::vector<Tried> try_all(const Matrix& w, const LowRankOptions& o) {
  FactorOptions options;
  options.seed = o.seed;
  const double whole = frobenius_norm(w);
  std::vector<Tried> tried;
  for (Method method : all_methods) {
    const auto begin = std::chrono::steady_clock::now();
    const LowRank f = factor(method, w, o.rank, nullptr, nullptr, options);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    tried.push_back({method, whole > 0 ? weighted_error(w, f) / whole : 0, seconds});
  }
  return tried;
}

std::string drawn(const LowRankOptions& o, const Matrix& w, const std::vector<Tried>& tried, const std::vector<double>& sigma) {
  Chart chart{fmt::format("{} [{}, {}] at rank {}", o.tensor.empty() ? o.path : o.tensor, w.rows, w.cols, o.rank), {}};
  Panel errors{"Error, of the matrix's norm", {}}, values{"Singular values", {}};
  for (const Tried& t : tried)
    errors.bars.push_back({std::string(name(t.method)), t.error, fmt::format("{:.4f}", t.error), t.method == Method::svd});
  constexpr size_t most = 32;
  const size_t step = (sigma.size() + most - 1) / most;
  for (size_t i = 0; i < sigma.size(); i += step)
    values.bars.push_back({std::to_string(i + 1), sigma[i], fmt::format("{:.4g}", sigma[i]), int64_t(i) < o.rank});
  chart.panels = {errors, values};
  return svg(chart);
}

void print_table(const LowRankOptions& o, const Matrix& w, const std::vector<Tried>& tried, const std::vector<double>& sigma) {
  fmt::print("[{}, {}] at rank {}: {} of {} numbers\n\n", w.rows, w.cols, o.rank, grouped(o.rank * (w.rows + w.cols)),
             grouped(w.rows * w.cols));
  Table table{{"method", "error", "of the least", "time"}, {}};
  const double least = tried[0].error;
  for (const Tried& t : tried)
    table.rows.push_back({std::string(name(t.method)), fmt::format("{:.3e}", t.error),
                          least > 1e-12 ? fmt::format("{:.3f}", t.error / least) : "–", duration_text(t.seconds)});
  fmt::print("{}\nsingular values:", table.text());
  const size_t shown = std::min<size_t>(sigma.size(), 8);
  for (size_t i = 0; i < shown; ++i) fmt::print(" {:.4g}", sigma[i]);
  if (size_t(o.rank) < sigma.size()) fmt::print(" … the first left out {:.4g}", sigma[size_t(o.rank)]);
  fmt::print(" … the last {:.4g}\n", sigma.back());
}

void lowrank(const LowRankOptions& o) {
  if (!o.svg.empty()) check_output(o.svg, "--svg");
  if (o.threads < 0 || o.threads > 1024) fail_input("--threads is {}; give 1 to 1024, or 0 for all processors", o.threads);
  const Matrix w = read_matrix(o);
  check_finite(w, o.tensor.empty() ? o.path : o.tensor);
  if (o.rank < 1 || o.rank > std::min(w.rows, w.cols))
    fail_input("--rank is {}; a matrix [{}, {}] takes 1 to {}", o.rank, w.rows, w.cols, std::min(w.rows, w.cols));
  set_math_threads(o.threads > 0 ? o.threads : available_processors());
  const std::vector<Tried> tried = try_all(w, o);
  const std::vector<double> sigma = svd(w).s;
  if (!o.svg.empty()) {
    OutputFile file(o.svg);
    file.write(drawn(o, w, tried, sigma));
    file.finish();
  }
  if (!o.json) return print_table(o, w, tried, sigma);
  Json out{{"shape", {w.rows, w.cols}}, {"rank", o.rank}, {"methods", Json::array()}, {"singular_values", sigma}};
  for (const Tried& t : tried) out["methods"].push_back({{"method", name(t.method)}, {"error", t.error}, {"seconds", t.seconds}});
  print_json(out);
}

}  // namespace

void add_lowrank(CLI::App& program, Work& work) {
  auto o = std::make_shared<LowRankOptions>();
  CLI::App& c = add_command(program, "lowrank", "factorise a matrix by SVD, pivoted QR, randomised SVD and CUR",
                            "  mla lowrank matrix.npy --rank 32\n"
                            "  mla lowrank model.safetensors --tensor model.layers.0.self_attn.k_proj.weight --rank 64 --svg errors.svg\n"
                            "  mla lowrank model.gguf --tensor layers.0.attn.k --rank 64 --json");
  c.add_option("FILE", o->path, "a .npy or .safetensors file, or a model")->required()->group("arguments");
  c.add_option("--tensor", o->tensor, "the matrix's name in a .safetensors file, or the program's name for a model's")
      ->option_text("NAME")
      ->group("work");
  c.add_option("--rank", o->rank, "rows and columns that are kept")->required()->option_text("R")->group("work");
  c.add_option("--seed", o->seed, "of the randomised SVD (default: 0)")->option_text("S")->group("work");
  c.add_option("-t,--threads", o->threads, "threads to compute with (default: all processors)")->option_text("N")->group("machine");
  c.add_option("--svg", o->svg, "also draw errors and singular values")->option_text("FILE")->group("output");
  add_json(c, o->json);
  c.final_callback([o, &work] { work = [o] { lowrank(*o); }; });
}

}  // namespace mla
