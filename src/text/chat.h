// Chat prompts: known templates by name, recognised from a file's template text. Template programs from files are never run.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mla {

struct Message {
  std::string role;  // system, user, assistant
  std::string content;
};

enum class ChatStyle { deepseek_v2, deepseek_v3, llama2, llama3, llama3_1, mistral, mistral_v3, chatml, smollm2, qwen1_5, qwen2, qwen2_5 };

ChatStyle parse_chat_style(std::string_view name);               // raises Error that names the choices
ChatStyle recognise_chat_style(std::string_view template_text);  // raises Error that names the choices
std::string_view name(ChatStyle style);

// The prompt up to where the assistant starts to write, control tokens spelled out, BOS included where the template has it (tokenize with
// parse_special and without add_special).
std::string chat_prompt(ChatStyle style, std::span<const Message> messages, bool add_generation_prompt = true);

// Spellings of the tokens that end a turn in this style.
std::vector<std::string> chat_stops(ChatStyle style);

}  // namespace mla
