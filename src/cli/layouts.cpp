// Builds the rows of the paper's Table 1 for a model's shape.
#include "cli/layouts.h"

#include <fmt/core.h>

#include <algorithm>

namespace mla {

std::vector<AttentionKind> four_attentions(const Config& c) {
  const int n_h = c.num_attention_heads, d_h = head_size(c);
  const bool grouped = !c.is_mla() && c.num_key_value_heads > 1 && c.num_key_value_heads < n_h;
  int groups = grouped ? c.num_key_value_heads : std::max(1, std::min(8, n_h / 2));
  while (n_h % groups != 0) --groups;
  const KvLayout latent = c.is_mla() ? c.kv_layout() : KvLayout::mla(4 * d_h, std::max(2, d_h / 4 * 2));
  return {{"MHA", "2 n_h d_h", KvLayout::mha(n_h, d_h), !c.is_mla() && c.num_key_value_heads == n_h},
          {fmt::format("GQA, {} groups", groups), "2 n_g d_h", KvLayout::gqa(groups, d_h), grouped},
          {"MQA", "2 d_h", KvLayout::mqa(d_h), !c.is_mla() && c.num_key_value_heads == 1 && n_h > 1},
          {"MLA", "d_c + d_R", latent, c.is_mla()}};
}

}  // namespace mla
