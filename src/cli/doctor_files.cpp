// What can be wrong with a checkpoint before it runs; each check is a mistake that some program made with these models.
#include "cli/doctor.h"
#include "core/check.h"
#include "core/quant.h"
#include "model/rope.h"

#include <algorithm>
#include <cmath>

namespace mla {
namespace {

Check good(std::string name, std::string found) { return {std::move(name), Verdict::ok, std::move(found)}; }
Check bad(std::string name, std::string found) { return {std::move(name), Verdict::wrong, std::move(found)}; }

Check latent_norm(const Checkpoint& checkpoint, const Config& c) {
  const char* name = "latent norm";
  const StoredTensor* norm = checkpoint.find("layers.0.attn.kv_a_norm");
  if (!norm) return bad(name, "layer 0 has no kv_a_layernorm");
  if (norm->value.count() != c.kv_lora_rank)
    return bad(name, fmt::format("kv_a_layernorm has {} elements; it covers the latent alone, {}", norm->value.count(), c.kv_lora_rank));
  return good(name, fmt::format("covers the latent's {} columns and not the {} rotary ones; eps {:g}", c.kv_lora_rank, c.qk_rope_head_dim,
                                c.latent_norm_eps));
}

Check softmax_scale(const Config& c) {
  const RopeScaling& s = c.rope_scaling;
  const double plain = 1 / std::sqrt(double(c.query_dim()));
  if (s.type != RopeScaling::Type::yarn) return good("softmax scale", fmt::format("{:.6f} = {}^-0.5", c.softmax_scale(), c.query_dim()));
  if (!c.is_mla() || s.mscale_all_dim == 0)
    return good("softmax scale", fmt::format("{:.6f}; YaRN without mscale_all_dim leaves it as it is", c.softmax_scale()));
  const double mscale = 0.1 * s.mscale_all_dim * std::log(s.factor) + 1, wanted = plain * mscale * mscale;
  if (std::fabs(c.softmax_scale() / wanted - 1) > 1e-9)
    return bad("softmax scale", fmt::format("{:.6f}, and YaRN asks for {:.6f}", c.softmax_scale(), wanted));
  return good("softmax scale",
              fmt::format("{:.6f} = {}^-0.5 · (0.1 · {:g} · ln {:g} + 1)²", wanted, c.query_dim(), s.mscale_all_dim, s.factor));
}

Check rotary(const Config& c) {
  const char* name = "rotary positions";
  const std::vector<double> frequencies = rope_frequencies(c);
  for (size_t i = 0; i < frequencies.size(); ++i)
    if (!std::isfinite(frequencies[i]) || frequencies[i] <= 0 || (i > 0 && frequencies[i] > frequencies[i - 1] * (1 + 1e-9)))
      return bad(name, fmt::format("the angle of pair {} is {:g} a position; angles are positive and fall", i, frequencies[i]));
  const RopeScaling& s = c.rope_scaling;
  if (s.type != RopeScaling::Type::none && s.original_max_position_embeddings > c.max_position_embeddings)
    return bad(name, fmt::format("scaled from {} positions, more than the {} the model has", s.original_max_position_embeddings,
                                 c.max_position_embeddings));
  return good(name, fmt::format("pairs are {}; {:g} … {:.3g} radians a position, cos and sin × {:.4f}",
                                c.rope_interleaved ? "neighbours (2i, 2i+1)" : "halves (i, i + d/2)", frequencies.front(),
                                frequencies.back(), rope_magnitude(c)));
}

Check routing(const Checkpoint& checkpoint, const Config& c) {
  const char* name = "routing";
  for (int layer = 0; layer < c.num_hidden_layers; ++layer) {
    if (!c.is_moe_layer(layer)) continue;
    const StoredTensor* router = checkpoint.find(fmt::format("layers.{}.ffn.router", layer));
    if (!router) return bad(name, fmt::format("layer {} has no gate", layer));
    if (router->value.shape[0] != c.n_routed_experts)
      return bad(name,
                 fmt::format("layer {}'s gate scores {} experts, and there are {}", layer, router->value.shape[0], c.n_routed_experts));
  }
  const char* weights = c.norm_topk_prob ? "renormalised" : "not renormalised";
  if (c.norm_topk_prob && c.routed_scaling_factor != 1)
    return good(name, fmt::format("weights renormalised, so routed_scaling_factor {:g} is not applied", c.routed_scaling_factor));
  if (c.topk_method == Gating::greedy)
    return good(name, fmt::format("softmax over {}, the {} best; {}, × {:g}", c.n_routed_experts, c.num_experts_per_tok, weights,
                                  c.routed_scaling_factor));
  return good(name, fmt::format("{} of {} groups by their best expert, then the {} best; {}, × {:g}", c.topk_group, c.n_group,
                                c.num_experts_per_tok, weights, c.routed_scaling_factor));
}

// Rows of blocks must end with a block; a width that is no multiple of 256 needs types with blocks of 32.
Check widths(const Checkpoint& checkpoint) {
  int odd = 0;
  for (const StoredTensor& t : checkpoint.tensors()) {
    const int64_t cols = t.value.shape[t.value.rank - 1];
    if (cols % info(t.value.dtype).block != 0)
      return bad("row widths", fmt::format("{} has rows of {}, no multiple of {}'s blocks of {}", t.name, cols, info(t.value.dtype).name,
                                           info(t.value.dtype).block));
    odd += t.value.rank > 1 && cols % 256 != 0;
  }
  return good("row widths", odd ? fmt::format("{} of {} tensors have rows that are no multiple of 256; the tail is handled", odd,
                                              checkpoint.tensors().size())
                                : fmt::format("all {} tensors end with whole blocks", checkpoint.tensors().size()));
}

// The first rows of every tensor; whole ones where they are short.
Check numbers(const Checkpoint& checkpoint) {
  std::vector<float> values;
  float most = 0;
  for (const StoredTensor& t : checkpoint.tensors()) {
    const int64_t cols = t.value.shape[t.value.rank - 1], block = info(t.value.dtype).block;
    if (cols % block != 0 || t.value.dtype == DType::i32 || t.value.dtype == DType::i64) continue;
    const int64_t n = std::min<int64_t>(t.value.count(), std::max<int64_t>(cols, (1 << 16) / cols * cols));
    values.resize(size_t(n));
    Tensor rows = view(t.value.data, t.value.dtype, {n / cols, cols});
    rows.scales = t.value.scales;
    dequantise(rows, values.data());
    for (float x : values) {
      if (!std::isfinite(x))
        return bad("numbers", fmt::format("{} holds {}; f16 overflows where bf16 does not, so write it as bf16", t.name, x));
      most = std::max(most, std::fabs(x));
    }
  }
  return good("numbers", fmt::format("finite where looked, the first 65536 of each tensor; the largest is {:.3g}", most));
}

Check tied(const Checkpoint& checkpoint, const Config& c) {
  const bool head = checkpoint.find("lm_head");
  if (!head && !c.tie_word_embeddings && checkpoint.format() == Format::hf)
    return bad("output head", "the file has none, and the config does not tie it to the embedding (tie_word_embeddings)");
  return good("output head", head ? "has its own weights" : "is the embedding (tied)");
}

Check one_bos(const Tokenizer& tokenizer) {
  const char* name = "exactly one BOS";
  const int32_t bos = tokenizer.bos();
  if (bos < 0) return good(name, "this tokenizer has none");
  auto count = [&](const std::vector<int32_t>& ids) { return std::count(ids.begin(), ids.end(), bos); };
  const auto plain = count(tokenizer.encode("hello", true, true));
  if (plain != int(tokenizer.adds_bos()))
    return bad(name, fmt::format("a plain text gets {} and the tokenizer asks for {}", plain, int(tokenizer.adds_bos())));
  std::string chat = "no chat template";
  if (!tokenizer.chat_template().empty()) {
    try {
      const ChatStyle style = recognise_chat_style(tokenizer.chat_template());
      const Message hello{"user", "hello"};
      const std::string prompt = chat_prompt(style, std::span(&hello, 1));
      const auto ids = tokenizer.encode(prompt, false, true);
      // Styles such as chatml start with a control token of their own, which may be the same token as BOS.
      const bool starts = !ids.empty() && ids[0] == bos;
      if (starts && ids.size() > 1 && ids[1] == bos) return bad(name, "a chat prompt starts with two");
      chat = fmt::format("a chat prompt ({}) {}", mla::name(style), starts ? "starts with one" : "has none in front");
    } catch (const Error& error) { return bad(name, error.what()); }
  }
  return good(name, fmt::format("a plain text gets {}; {}", plain, chat));
}

Check digits(const Tokenizer& tokenizer) {
  const auto ids = tokenizer.encode("12345678", false, false);
  std::string pieces;
  for (int32_t id : ids) pieces.append(pieces.empty() ? "" : "|").append(tokenizer.decode(std::span(&id, 1)));
  return good("digits", fmt::format("12345678 is {}", pieces));
}

Check round_trip(const Tokenizer& tokenizer) {
  const std::string text = "Grüße, 世界! 🌍 naïve  spaces\n\ttab é";
  const std::string back = tokenizer.decode(tokenizer.encode(text, false, false));
  if (back != text) return bad("round trip", fmt::format("\"{}\" comes back as \"{}\"", text, back));
  return good("round trip", "text of many scripts comes back as it was");
}

}  // namespace

std::string_view name(Verdict verdict) {
  switch (verdict) {
    case Verdict::ok: return "ok";
    case Verdict::wrong: return "wrong";
    case Verdict::skipped: return "skipped";
  }
  return "?";
}

std::vector<Check> check_files(const Checkpoint& checkpoint, const Config& c, const Tokenizer* tokenizer) {
  std::vector<Check> out{widths(checkpoint), numbers(checkpoint), rotary(c), softmax_scale(c), tied(checkpoint, c)};
  if (c.is_mla()) out.push_back(latent_norm(checkpoint, c));
  if (c.n_routed_experts > 0) out.push_back(routing(checkpoint, c));
  if (!tokenizer) {
    out.push_back({"tokenizer", Verdict::skipped, "there is none; the model runs on ids"});
    return out;
  }
  if (tokenizer->vocab_size() > c.vocab_size)
    out.push_back(bad("vocabulary", fmt::format("the tokenizer has {} tokens and the model {}", tokenizer->vocab_size(), c.vocab_size)));
  out.push_back(one_bos(*tokenizer));
  out.push_back(digits(*tokenizer));
  out.push_back(round_trip(*tokenizer));
  return out;
}

}  // namespace mla
