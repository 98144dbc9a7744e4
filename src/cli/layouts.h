// The four attentions of one size: what MHA, GQA, MQA and MLA would keep for a given model.
#pragma once

#include "model/config.h"

#include <string>
#include <vector>

namespace mla {

struct AttentionKind {
  std::string name;     // "GQA, 8 groups"
  std::string formula;  // the paper's, Table 1
  KvLayout layout;
  bool own = false;  // what the model has
};

// In the paper's order: MHA, GQA, MQA, MLA. Same query heads n_h and head size d_h throughout. Where the model has no latents of its own,
// d_c = 4 d_h and d_R = d_h / 2, as in DeepSeek-V2; where it has no groups, the most up to 8 that divide its heads.
std::vector<AttentionKind> four_attentions(const Config& config);

inline int head_size(const Config& c) { return c.is_mla() ? c.qk_nope_head_dim : c.head_dim; }

}  // namespace mla
