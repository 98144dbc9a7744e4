// Which tensors a model of a given shape has in each format, and how each is stored.
#pragma once

#include "io/checkpoint.h"
#include "io/writer.h"
#include "model/config.h"

#include <string>
#include <vector>

namespace mla {

// All tensors in the order of the file, under our names, with their type chosen for the `wanted` one. GGUF has stacks of experts and
// kv_b split into k_b and v_b; HF has an expert a tensor and kv_b whole. `biases`: names of the biases the model has.
// fp8: the layers' matrices, each followed by its scales; what is left is bf16. `notes` gets a sentence for each kind of tensor that could
// not have its type.
std::vector<TensorPlan> plan_tensors(const Config& config, Format format, DType wanted, const std::vector<std::string>& biases,
                                     std::vector<std::string>& notes);

// The biases a config implies: those of a random model.
std::vector<std::string> implied_biases(const Config& config);

// What a file of ours says about itself beside the configuration: general.file_type and its like.
void describe_file(nlohmann::json& metadata, DType type);

}  // namespace mla
