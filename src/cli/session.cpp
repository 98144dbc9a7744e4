// Opening a model, and the line of figures.
#include "cli/session.h"

#include "cli/format.h"
#include "cli/interrupt.h"
#include "cli/machine.h"
#include "cli/progress.h"
#include "core/check.h"
#include "io/json.h"

#include <algorithm>

namespace mla {
namespace {

using SortedJson = nlohmann::json;

// A GGUF key's value where it is there and of the right kind.
const SortedJson* value(const SortedJson& metadata, const char* key, bool (SortedJson::*is_kind)() const noexcept, const char* kind) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) return nullptr;
  if (!((*found).*is_kind)()) fail_input("the GGUF's {} is not a {}", key, kind);
  return &*found;
}

std::string text_of(const SortedJson& metadata, const char* key) {
  const SortedJson* v = value(metadata, key, &SortedJson::is_string, "string");
  return v ? v->get<std::string>() : std::string();
}

std::optional<bool> flag_of(const SortedJson& metadata, const char* key) {
  const SortedJson* v = value(metadata, key, &SortedJson::is_boolean, "flag");
  return v ? std::optional(v->get<bool>()) : std::nullopt;
}

int32_t id_of(const SortedJson& metadata, const char* key) {
  const SortedJson* v = value(metadata, key, &SortedJson::is_number_integer, "whole number");
  if (!v) return -1;
  const auto id = v->get<int64_t>();
  return id >= 0 && id < INT32_MAX ? int32_t(id) : -1;
}

// Complains about options before anything is loaded.
const ModelOptions& checked(const ModelOptions& options) {
  options.kv_type();
  options.form();
  if (options.context < 0) fail_input("--context is {}; give the number of tokens the cache should have room for", options.context);
  if (!options.dump.empty()) check_output(options.dump, "--dump");
  return options;
}

std::unique_ptr<Model> load(const Checkpoint& checkpoint, Device& device) {
  ProgressBar bar("loading");
  return std::make_unique<Model>(checkpoint, device, [&](double fraction) {
    throw_if_interrupted();
    bar.update(fraction);
  });
}

}  // namespace

Tokenizer::GgufVocabulary gguf_vocabulary(const Checkpoint& checkpoint) {
  const SortedJson& m = checkpoint.metadata();
  Tokenizer::GgufVocabulary v;
  v.model = text_of(m, "tokenizer.ggml.model");
  v.pre = text_of(m, "tokenizer.ggml.pre");
  v.tokens = checkpoint.strings("tokenizer.ggml.tokens");
  v.merges = checkpoint.strings("tokenizer.ggml.merges");
  v.scores = checkpoint.floats("tokenizer.ggml.scores");
  v.types = checkpoint.ints("tokenizer.ggml.token_type");
  v.bos = id_of(m, "tokenizer.ggml.bos_token_id");
  v.eos = id_of(m, "tokenizer.ggml.eos_token_id");
  v.unknown = id_of(m, "tokenizer.ggml.unknown_token_id");
  v.add_bos = flag_of(m, "tokenizer.ggml.add_bos_token");
  v.add_eos = flag_of(m, "tokenizer.ggml.add_eos_token");
  v.add_space_prefix = flag_of(m, "tokenizer.ggml.add_space_prefix");
  v.chat_template = text_of(m, "tokenizer.chat_template");
  return v;
}

std::optional<Tokenizer> open_tokenizer(const Checkpoint& checkpoint) {
  if (checkpoint.format() == Format::gguf) {
    if (!checkpoint.metadata().contains("tokenizer.ggml.model")) return std::nullopt;
    return Tokenizer::from_gguf(gguf_vocabulary(checkpoint));
  }
  const auto vocabulary = checkpoint.text("tokenizer.json");
  if (!vocabulary) return std::nullopt;
  return Tokenizer::from_json(*vocabulary, checkpoint.tokenizer_config());
}

Session::Session(const ModelOptions& options) : options_(checked(options)), checkpoint_(Checkpoint::open(options.path)) {
  tokenizer_ = open_tokenizer(checkpoint_);
  device_ = options.machine.open();
  device_->activations = options.activations();
  const double begin = now();
  model_ = load(checkpoint_, *device_);
  device_->memory().wait();
  loading_seconds_ = now() - begin;
  for (const StoredTensor& t : checkpoint_.tensors()) loaded_bytes_ += double(t.bytes());
  model_->form = options.form();
  if (tokenizer_ && tokenizer_->vocab_size() > config().vocab_size)
    fail_input("the tokenizer has {} tokens and the model only {}; they do not belong together", tokenizer_->vocab_size(),
               config().vocab_size);
  if (options.dump.empty()) return;
  dump_ = std::make_unique<DumpFile>(options.dump);
  model_->dump = [this](const std::string& name, const Tensor& tensor) { dump_->add(name, tensor); };
}

Session::~Session() = default;

const Tokenizer& Session::need_tokenizer(const char* instead) const {
  if (!tokenizer_) fail_input("{} has no tokenizer; {}", options_.path, instead);
  return *tokenizer_;
}

LatentCache Session::make_cache(int64_t tokens) const {
  const int64_t room = options_.context > 0 ? options_.context : std::max<int64_t>(tokens, 1);
  if (tokens > room)
    fail_input("this needs room for {} tokens in the cache and --context gives {}; raise --context or shorten the work", tokens, room);
  const KvFormat format{config().kv_layout(), options_.kv_type()};
  const double bytes = double(room) * double(format.row_bytes()) * config().num_hidden_layers;
  if (device_->memory().place() == Place::host && bytes > memory().total_bytes)
    fail_input("a cache of {} tokens takes {} and this machine has {}; lower --context or take --kv-type i8", room, bytes_text(bytes),
               bytes_text(memory().total_bytes));
  return model_->make_cache(room, options_.kv_type());
}

ChatStyle Session::chat_style(const std::string& name) const {
  if (!name.empty()) return parse_chat_style(name);
  const std::string& source = need_tokenizer("a chat needs one").chat_template();
  return recognise_chat_style(source);
}

std::vector<int32_t> Session::end_tokens() const {
  std::vector<int32_t> ids = config().eos_token_ids;
  if (tokenizer_) ids.push_back(tokenizer_->eos());
  // Chat models end a turn with more tokens than their config says; the list is here.
  if (const auto text = checkpoint_.text("generation_config.json")) {
    const SortedJson json = parse_json(*text, "generation_config.json");
    const SortedJson eos = json.is_object() ? json.value("eos_token_id", SortedJson()) : SortedJson();
    for (const SortedJson& id : eos.is_array() ? eos : SortedJson::array({eos}))
      if (id.is_number_integer() && id.get<int64_t>() >= 0 && id.get<int64_t>() < config().vocab_size) ids.push_back(id.get<int32_t>());
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  std::erase_if(ids, [](int32_t id) { return id < 0; });
  return ids;
}

void Session::finish_dump() {
  if (dump_) dump_->finish();
}

RunFigures::RunFigures(const GenerateFigures& figures, const LatentCache& cache, Device& device)
    : work(figures), cache_bytes_per_token(cache.bytes_per_token()), kv_type(info(cache.format().type).name) {
  if (figures.decode_tokens > 0) read_gb_s = device.probe(0.1).read_gb_s;
}

double RunFigures::prefill_tok_s() const { return work.prefill_seconds > 0 ? double(work.prefill_tokens) / work.prefill_seconds : 0; }
double RunFigures::decode_tok_s() const { return work.decode_seconds > 0 ? double(work.decode_tokens) / work.decode_seconds : 0; }
double RunFigures::share() const {
  return read_gb_s > 0 && work.decode_seconds > 0 ? work.decode_bytes / work.decode_seconds / (read_gb_s * 1e9) : 0;
}

void RunFigures::print() const {
  std::string line = fmt::format("prefill {} tokens", work.prefill_tokens);
  if (work.prefill_tokens > 0) line += fmt::format(" at {} tok/s", rate_text(prefill_tok_s()));
  if (work.decode_tokens > 0) line += fmt::format(" · decode {} tokens at {} tok/s", work.decode_tokens, rate_text(decode_tok_s()));
  line += fmt::format(" · cache {} bytes per token ({})", cache_bytes_per_token, kv_type);
  if (work.decode_tokens > 0)
    line += fmt::format(" · {:.0f}% of memory bandwidth ({} of {} GB/s)", 100 * share(),
                        rate_text(work.decode_bytes / work.decode_seconds / 1e9), rate_text(read_gb_s));
  fmt::print(stderr, "mla: {}\n", line);
}

void RunFigures::add_to(nlohmann::ordered_json& json) const {
  using nlohmann::ordered_json;
  json["prefill_tok_s"] = work.prefill_tokens > 0 ? ordered_json(prefill_tok_s()) : ordered_json();
  json["decode_tok_s"] = work.decode_tokens > 0 ? ordered_json(decode_tok_s()) : ordered_json();
  json["cache_bytes_per_token"] = cache_bytes_per_token;
  json["kv_type"] = kv_type;
  json["bandwidth_share"] = work.decode_tokens > 0 ? ordered_json(share()) : ordered_json();
}

}  // namespace mla
