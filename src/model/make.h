// Making model files: random checkpoints of any shape, quantised GGUF files, HF folders. The work behind `mla init` and `mla quantize`.
#pragma once

#include "io/writer.h"
#include "model/model.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace mla {

class Threads;

struct Made {
  int64_t tensors = 0, bytes = 0;
  std::vector<std::string> notes;  // what was stored otherwise than asked for, in sentences
};

// Everything here works in bounded memory, writes to a temporary name and renames it at the end: when it fails, or `progress` throws
// (Ctrl-C), nothing is left behind. `threads` does the encoding; the result does not depend on their number.

// A random checkpoint: matrices normal with standard deviation 1/√columns, norms 1, a function of (seed, tensor, element) alone.
// `out` ending in .gguf: a GGUF of that type with a stand-in byte vocabulary; else an HF folder, f32, f16, bf16 or fp8.
Made make_random(const Config& config, const std::filesystem::path& out, DType type, uint64_t seed, Threads& threads,
                 const Progress& progress = {});

// A GGUF of the model, tokenizer and chat template included, that llama.cpp runs. Norms, biases and the router stay f32; with a
// quantised type the output head is q6_k (q8_0 for type q8_0); rows that are no multiple of a block fall back to q8_0 or f16.
Made quantize_model(const Checkpoint& checkpoint, const std::filesystem::path& out, DType type, Threads& threads,
                    const Progress& progress = {});

// An HF folder of the model, f32, f16, bf16 or fp8 (the layers' matrices, with scales; the rest bf16). An HF source's tokenizer files go
// with it; a GGUF's vocabulary does not.
Made export_hf(const Checkpoint& checkpoint, const std::filesystem::path& folder, DType type, Threads& threads,
               const Progress& progress = {});

// The tokenizer's files in an HF folder, its chat template and what ends a text; none of a GGUF.
std::vector<SideFile> text_files(const Checkpoint& checkpoint);

// What a folder has instead of the checkpoint's own: the configuration, tensors under our names, the files beside them.
struct Replacement {
  Config config;
  std::map<std::string, std::vector<float>> tensors;
  std::vector<SideFile> files;
};
// An HF folder of a model that shares with the checkpoint what `instead` does not name.
Made export_hf(const Checkpoint& checkpoint, const Replacement& instead, const std::filesystem::path& folder, DType type, Threads& threads,
               const Progress& progress = {});

// Reads a config.json, or the one in a folder.
Config read_config_file(const std::filesystem::path& path);

}  // namespace mla
