// mla tokenize: text to ids and back.
#include "cli/command.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/session.h"
#include "core/check.h"
#include "io/npy.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <filesystem>

namespace mla {
namespace {

namespace fs = std::filesystem;

struct TokenizeOptions {
  std::string path, file, decode, out;
  std::optional<std::string> text;
  bool add_special = false, parse_special = false, json = false, pieces = false;
};

Tokenizer open(const std::string& path) {
  std::error_code ignored;
  if (fs::is_directory(path, ignored) && !fs::exists(fs::path(path) / "config.json") && fs::exists(fs::path(path) / "tokenizer.json"))
    return open((fs::path(path) / "tokenizer.json").string());
  if (fs::path(path).extension() == ".json") {
    const fs::path config = fs::path(path).parent_path() / "tokenizer_config.json";
    return Tokenizer::from_json(read_file(path), fs::exists(config) ? read_file(config.string()) : "");
  }
  auto tokenizer = open_tokenizer(Checkpoint::open(path));
  if (!tokenizer) fail_input("{} has no tokenizer; give a model that has one, or a tokenizer.json", path);
  return std::move(*tokenizer);
}

void decode(const Tokenizer& tokenizer, const TokenizeOptions& o) {
  const std::vector<int32_t> ids = read_npy_ids(o.decode);
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= tokenizer.vocab_size())
      fail_input("{}: id {} at {} is outside the vocabulary of {}", o.decode, ids[i], i, tokenizer.vocab_size());
  const std::string text = tokenizer.decode(ids);
  if (o.json)
    print_json({{"text", text}, {"tokens", ids.size()}});
  else
    std::fwrite(text.data(), 1, text.size(), stdout);
}

void encode(const Tokenizer& tokenizer, const TokenizeOptions& o) {
  const std::string text = o.text ? *o.text : read_file(o.file);
  const std::vector<int32_t> ids = tokenizer.encode(text, o.add_special, o.parse_special);
  if (!o.out.empty()) write_npy_ids(o.out, ids);
  if (o.json) {
    print_json({{"ids", ids}, {"tokens", ids.size()}, {"bytes", text.size()}});
    return;
  }
  if (o.pieces) {
    for (int32_t id : ids)
      fmt::print("{:>8}  {}\n", id,
                 nlohmann::json(tokenizer.decode(std::span(&id, 1))).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  } else if (o.out.empty()) {
    fmt::print("{}\n", fmt::join(ids, " "));
  }
  std::fflush(stdout);
  fmt::print(stderr, "mla: {} tokens of {} bytes\n", ids.size(), text.size());
}

void tokenize(const TokenizeOptions& o) {
  const int sources = int(o.text.has_value()) + !o.file.empty() + !o.decode.empty();
  if (sources != 1)
    fail_input("there is {} to tokenize; give one of --text, --file and --decode", sources ? "more than one thing" : "nothing");
  if (!o.out.empty()) check_output(o.out, "-o");
  const Tokenizer tokenizer = open(o.path);
  o.decode.empty() ? encode(tokenizer, o) : decode(tokenizer, o);
}

}  // namespace

void add_tokenize(CLI::App& program, Work& work) {
  auto o = std::make_shared<TokenizeOptions>();
  CLI::App& c = add_command(program, "tokenize", "turn text into token ids, or ids into text",
                            "  mla tokenize model.gguf --text \"Hello, world\" --pieces\n"
                            "  mla tokenize tokenizer.json --file book.txt -o ids.npy\n"
                            "  mla tokenize model.gguf --decode ids.npy");
  add_model_path(c, o->path, "a model, a tokenizer.json, or a GGUF that holds only a vocabulary");
  c.add_option("--text", o->text, "the text, exactly these bytes")->option_text("TEXT")->group("text");
  c.add_option("-f,--file", o->file, "a file with the text; - is stdin")->option_text("FILE")->group("text");
  c.add_option("--decode", o->decode, "a .npy file with ids to turn back into text")->option_text("FILE")->group("text");
  c.add_flag("--add-special", o->add_special, "put the tokens around it that the tokenizer asks for, such as BOS")->group("text");
  c.add_flag("--parse-special", o->parse_special, "control tokens spelled in the text are these tokens")->group("text");
  c.add_option("-o,--output", o->out, "also write the ids to a .npy file")->option_text("FILE")->group("output");
  c.add_flag("--pieces", o->pieces, "one token a line, with the text it stands for")->group("output");
  add_json(c, o->json);
  c.final_callback([o, &work] { work = [o] { tokenize(*o); }; });
}

}  // namespace mla
