// mla logits: the model's logits for a sequence of ids, as a .npy file.
#include "cli/command.h"
#include "cli/help.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/session.h"
#include "core/check.h"
#include "io/npy.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstring>

namespace mla {
namespace {

struct LogitsOptions {
  ModelOptions model;
  std::string ids, rows, out;
  int64_t chunk = 512;
};

// Which rows of the answer want the logits at a position; several may.
std::vector<std::vector<int64_t>> rows_by_position(const std::vector<int32_t>& rows, size_t positions) {
  std::vector<std::vector<int64_t>> wanted(positions);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 0 || size_t(rows[i]) >= positions) fail_input("--rows names position {}, and there are {} ids", rows[i], positions);
    wanted[size_t(rows[i])].push_back(int64_t(i));
  }
  return wanted;
}

void logits(const LogitsOptions& o) {
  if (o.chunk < 1) fail_input("--chunk is {}; give the number of tokens in a step, 1 or more", o.chunk);
  check_output(o.out, "-o");
  const std::vector<int32_t> ids = read_npy_ids(o.ids);
  if (ids.empty()) fail_input("{} holds no ids; give at least one", o.ids);
  std::vector<int32_t> rows;
  if (!o.rows.empty()) rows = read_npy_ids(o.rows);
  if (o.rows.empty())
    for (size_t i = 0; i < ids.size(); ++i) rows.push_back(int32_t(i));
  const auto wanted = rows_by_position(rows, ids.size());

  Session session(o.model);
  LatentCache cache = session.make_cache(int64_t(ids.size()));
  const int sequence = cache.open();
  const auto vocab = size_t(session.config().vocab_size);
  std::vector<float> out(rows.size() * vocab);
  GenerateFigures work;
  ProgressBar bar("running");
  const auto begin = std::chrono::steady_clock::now();
  until_interrupted([&] {
    for (size_t at = 0; at < ids.size(); at += size_t(o.chunk)) {
      const size_t n = std::min(size_t(o.chunk), ids.size() - at);
      const auto is_wanted = [&](size_t i) { return !wanted[at + i].empty(); };
      size_t first = 0;
      while (first < n && !is_wanted(first)) ++first;
      const auto which = first == n ? Chunk::Logits::none : first == n - 1 ? Chunk::Logits::last : Chunk::Logits::all;
      const Chunk chunk{sequence, std::span(ids).subspan(at, n), which};
      Tensor all = session.model().forward(std::span(&chunk, 1), cache, [&](double fraction) {
        throw_if_interrupted();
        bar.update((double(at) + fraction * double(n)) / double(ids.size()));
      });
      CHECK(cache.length(sequence) == int64_t(at + n), "the cache is full at {} of {} tokens", at, ids.size());
      all = session.model().to_host(all);
      const size_t skipped = which == Chunk::Logits::last ? n - 1 : 0;
      for (size_t i = first; i < n; ++i)
        for (int64_t row : wanted[at + i])
          std::memcpy(out.data() + size_t(row) * vocab, all.f32() + int64_t(i - skipped) * all.stride[0], vocab * sizeof(float));
      work.prefill_tokens += int64_t(n);
      work.prefill_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }
  });
  bar.clear();
  session.finish_dump();
  if (!interrupted()) write_npy(o.out, out, int64_t(rows.size()), int64_t(vocab));
  RunFigures(work, cache, session.device()).print();
  if (interrupted()) give_up();
}

}  // namespace

void add_logits(CLI::App& program, Work& work) {
  auto o = std::make_shared<LogitsOptions>();
  CLI::App& c =
      add_command(program, "logits", "write the logits of a sequence of ids to a .npy file",
                  "  mla logits folder --ids ids.npy -o logits.npy\n"
                  "  mla logits folder --ids ids.npy --rows rows.npy --chunk 64 --attention absorbed --kv-type f32 -o logits.npy");
  o->model.activations_name = "i16";  // a measurement is of the model, not of the rounding that makes it fast
  add_model_options(c, o->model);
  c.add_option("--ids", o->ids, "a .npy file with the ids of one sequence, from position 0")
      ->required()
      ->option_text("FILE")
      ->group("work");
  c.add_option("--rows", o->rows, "a .npy file with the positions wanted (default: all)")->option_text("FILE")->group("work");
  c.add_option("--chunk", o->chunk, "tokens of a step (default: 512)")->option_text("N")->group("work");
  c.add_option("-o,--output", o->out, "the file to write: float32 [rows, vocab]")->required()->option_text("FILE")->group("work");
  c.final_callback([o, &work] { work = [o] { logits(*o); }; });
}

}  // namespace mla
