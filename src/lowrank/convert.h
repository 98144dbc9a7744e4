// A whole model of grouped-query attention as one of multi-head latent attention, calibrated on text.
#pragma once

#include "lowrank/layer_run.h"
#include "model/model.h"

#include <map>
#include <span>
#include <string>

namespace mla {

class Checkpoint;

enum class Refit : uint8_t { none, layer, drift };  // W_O to: nothing, this layer's own output, what the original's stream has after it

struct ConvertOptions {
  LayerOptions layer;
  double rope_theta = 0;                       // base of the rotary pairs' frequencies; 0: the original's
  int64_t q_lora_rank = 0;                     // of a query latent; 0: none
  int fit_passes = 1;                          // over the text, of the attention's fit by gradients; 0: none
  double fit_rate = 0.0125;                    // of its steps, times the share of the cache that goes
  bool sequential = true;                      // each layer is calibrated on the already converted ones
  Refit refit = Refit::drift;                  // of W_O, by ridge regression
  bool refit_down = true;                      // of W_down too, to the original's stream after the layer
  double output_ridge = 1e-1, down_ridge = 1;  // of the mean diagonal
  DType type = DType::bf16;  // of the checkpoint that is made; weights are rounded to it before the layers after them see them

  int64_t window = 512;          // tokens of a window of calibration
  int64_t constant_windows = 8;  // windows that the constants are taken from
};

// What differs from the original checkpoint: tensors under our names, rounded to `type`.
struct Converted {
  Config config;
  std::map<std::string, std::vector<float>> tensors;
};

// What a conversion knows of a layer, on the stream before it.
struct LayerCalibration {
  Matrix inputs;             // E[a aᵀ]
  std::vector<double> mean;  // E[a]
  DistanceSums distances;
};

// Raises Error, before any work, for a model that cannot be converted or options that do not fit it. What it says of the tensors themselves
// is in check_tensors of original.h. `config` is original_config of the checkpoint.
void check_convertible(const Checkpoint& checkpoint, const Config& config, const ConvertOptions& options);
// The configuration of what a conversion makes.
Config converted_config(const Config& config, const ConvertOptions& options);

// `tokens`: at least one window of text; a last, shorter window is left out. `progress` may throw, which ends the work.
Converted convert(const Checkpoint& checkpoint, std::span<const int32_t> tokens, const ConvertOptions& options, Device& device,
                  const Progress& progress = {});

// One calibration for many conversions: every layer on the original's stream.
std::vector<LayerCalibration> calibrate(const Checkpoint& checkpoint, std::span<const int32_t> tokens, const ConvertOptions& options,
                                        Device& device, const Progress& progress = {});
// From it, with nothing refitted; options that say how to calibrate or what to fit or refit count for nothing.
Converted convert(const Checkpoint& checkpoint, std::span<const LayerCalibration> calibration, const ConvertOptions& options,
                  Device& device, const Progress& progress = {});

}  // namespace mla
