// What the layers of one forward pass share. The pass is model.cpp; the two kinds of attention are mla.cpp and gqa.cpp.
#pragma once

#include "model/model.h"

namespace mla {

struct Step {
  const Config& config;
  Device& device;
  Arena& arena;
  const LatentCache& cache;
  MlaForm form;
  const Dump& dump;
  std::vector<Span> spans;     // one per chunk
  std::vector<int64_t> slots;  // of each token's cache row
  Tensor cos_sin;              // [n, d_R / 2, 2]
  std::string prefix;          // "layers.3."

  void note(const char* name, const Tensor& value) const {
    if (!dump) return;
    std::vector<float> storage;
    dump(prefix + name, on_host(value, device.memory(), storage));
  }
};

// x [n, D] += attention(x), and the tokens' rows enter the cache.
void attend_mla(Step& step, int layer, const MlaWeights& w, Tensor x);
void attend_gqa(Step& step, int layer, const GqaWeights& w, Tensor x);
// The same without W_O: what the heads put out, o [n, n_h, d_v].
void attend_mla_heads(Step& step, int layer, const MlaWeights& w, Tensor x, Tensor o);
// x [n, D] += ffn(norm(x))
void feed_forward(Step& step, const Layer& layer, Tensor x);

// Whether an MLA span is run in the latent space.
bool absorbs(const Step& step, const Span& span);

// True if n new tokens on a context of T are cheaper in the latent space: n·T·2(2d_c + d_R) + n·2d_c(d_h + d_v) operations a head
// against n·T·2(d_h + d_R + d_v) + T·2d_c(d_h + d_v) with keys and values formed. A single token is, whatever the context: the few
// operations that the first ones could spare cost more than they are where a batch's sequences no longer go together.
bool absorbed_is_cheaper(const Config& config, int64_t n, int64_t T);

}  // namespace mla
