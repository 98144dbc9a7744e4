// The checkpoint that is converted: its shape, its rotary frequencies, and one layer at a time on the device.
#pragma once

#include "lowrank/gqa_to_mla.h"
#include "model/model.h"

#include <span>
#include <string>
#include <vector>

namespace mla {

class Checkpoint;
struct StoredTensor;

std::vector<float> decoded(const StoredTensor& tensor);
bool has_biases(const Checkpoint& checkpoint);  // on queries, keys or values
// The configuration with Llama 3's scaling by its name, of which a GGUF has the divisors alone. Raises Error for divisors of another kind.
Config original_config(const Checkpoint& checkpoint);
// Raises Error for tensors of other shapes than the configuration asks for, and for numbers that are not finite; reads the whole model.
void check_tensors(const Checkpoint& checkpoint, const Config& config);
GqaShape shape_of(const Checkpoint& checkpoint, const Config& config);

// A layer of the original on the device, its quantised weights as f32, so that what is calibrated is the model and not its rounding.
class Original {
 public:
  Original(const Checkpoint& checkpoint, const Config& config, Device& device);
  void load(int layer);
  Matrix matrix(const char* name) const;
  const Layer& layer() const { return layer_; }
  const GqaWeights& gqa() const { return std::get<GqaWeights>(layer_.attention); }
  const DenseFfn& ffn() const { return std::get<DenseFfn>(layer_.ffn); }
  GqaMatrices matrices() const;  // biases are the last column of q, k and v, if there are any
  std::vector<float> embed(std::span<const int32_t> ids) const;
  // The normed stream x [n, D] that the attention reads, [n, shape.hidden]: with a 1 behind it where there are biases.
  void attention_inputs(const Tensor& x, std::vector<float>& out) const;

 private:
  Tensor vector(const char* name);  // none where the checkpoint has none
  Weight pack(const char* name);

  const Checkpoint& checkpoint_;
  const Config& config_;
  Device& device_;
  bool biased_;
  std::string prefix_;
  std::vector<std::vector<float>> vectors_;
  Layer layer_;
};

}  // namespace mla
