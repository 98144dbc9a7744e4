// The chat prompts of the supported families, each written out as the template that its models were published with renders them.
#include "text/chat.h"

#include "core/check.h"
#include "text/unicode.h"

#include <algorithm>
#include <array>

namespace mla {

namespace {

constexpr std::string_view kDeepseekBegin = "<｜begin▁of▁sentence｜>", kDeepseekEnd = "<｜end▁of▁sentence｜>";
constexpr std::string_view kSmolSystem = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
constexpr std::string_view kQwen15System = "You are a helpful assistant", kQwen2System = "You are a helpful assistant.";
constexpr std::string_view kQwen25System = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";

using Messages = std::span<const Message>;

struct Style {
  ChatStyle style;
  std::string_view name;
};

constexpr std::array<Style, 12> kStyles = {{{ChatStyle::deepseek_v2, "deepseek-v2"},
                                            {ChatStyle::deepseek_v3, "deepseek-v3"},
                                            {ChatStyle::llama2, "llama2"},
                                            {ChatStyle::llama3, "llama3"},
                                            {ChatStyle::llama3_1, "llama3.1"},
                                            {ChatStyle::mistral, "mistral"},
                                            {ChatStyle::mistral_v3, "mistral-v3"},
                                            {ChatStyle::chatml, "chatml"},
                                            {ChatStyle::smollm2, "smollm2"},
                                            {ChatStyle::qwen1_5, "qwen1.5"},
                                            {ChatStyle::qwen2, "qwen2"},
                                            {ChatStyle::qwen2_5, "qwen2.5"}}};

std::string choices() {
  std::string out;
  for (const Style& style : kStyles) out.append(out.empty() ? "" : ", ").append(style.name);
  return out;
}

bool is_trimmed(char32_t c) { return is_space(c) || (c >= 0x1C && c <= 0x1F); }

// As Python's strip, which is what templates trim with.
std::string_view trim(std::string_view text) {
  size_t begin = text.size(), end = 0;  // of what is not white space
  for (size_t i = 0; i < text.size();) {
    const size_t length = utf8_length(text.substr(i, 4)), step = std::max<size_t>(1, length);
    if (length == 0 || !is_trimmed(utf8_decode(text.substr(i, length)))) {
      begin = std::min(begin, i);
      end = i + step;
    }
    i += step;
  }
  return begin < end ? text.substr(begin, end - begin) : std::string_view();
}

void check_roles(Messages messages) {
  for (const Message& message : messages)
    if (message.role != "system" && message.role != "user" && message.role != "assistant")
      fail_input("a chat message has the role \"{}\"; roles are system, user, assistant", message.role);
}

// These templates know one system message, at the start, and then users and assistants in turn.
std::string_view take_system(Messages& messages, ChatStyle style) {
  std::string_view system;
  if (!messages.empty() && messages[0].role == "system") {
    system = messages[0].content;
    messages = messages.subspan(1);
  }
  for (size_t i = 0; i < messages.size(); i++)
    if (messages[i].role != (i % 2 == 0 ? "user" : "assistant"))
      fail_input("message {} is of the role {}; the {} template wants user and assistant in turn after an optional system message", i,
                 messages[i].role, name(style));
  return system;
}

std::string deepseek_v2(Messages messages, bool generate) {
  std::string out(kDeepseekBegin);
  for (const Message& message : messages) {
    if (message.role == "user")
      out.append("User: ").append(message.content).append("\n\n");
    else if (message.role == "assistant")
      out.append("Assistant: ").append(message.content).append(kDeepseekEnd);
    else
      out.append(message.content).append("\n\n");
  }
  return generate ? out.append("Assistant:") : out;
}

// All system messages go in front.
std::string deepseek_v3(Messages messages, bool generate) {
  std::string system, turns;
  bool first = true;
  for (const Message& message : messages) {
    if (message.role == "system") {
      system.append(first ? "" : "\n\n").append(message.content);
      first = false;
    } else if (message.role == "user") {
      turns.append("<｜User｜>").append(message.content);
    } else {
      turns.append("<｜Assistant｜>").append(message.content).append(kDeepseekEnd);
    }
  }
  return std::string(kDeepseekBegin) + system + turns + (generate ? "<｜Assistant｜>" : "");
}

std::string llama2(Messages messages, ChatStyle style) {
  const bool has_system = !messages.empty() && messages[0].role == "system";
  const std::string system(take_system(messages, style));
  std::string out;
  for (size_t i = 0; i < messages.size(); i++) {
    if (messages[i].role == "assistant") {
      out.append(" ").append(trim(messages[i].content)).append(" </s>");
      continue;
    }
    const bool first = i == 0 && has_system;
    const std::string content = first ? "<<SYS>>\n" + system + "\n<</SYS>>\n\n" + messages[i].content : messages[i].content;
    out.append("<s>[INST] ").append(trim(content)).append(" [/INST]");
  }
  return out;
}

std::string llama3(Messages messages, bool generate) {
  std::string out = "<|begin_of_text|>";
  for (const Message& message : messages)
    out.append("<|start_header_id|>" + message.role + "<|end_header_id|>\n\n").append(trim(message.content)).append("<|eot_id|>");
  return generate ? out.append("<|start_header_id|>assistant<|end_header_id|>\n\n") : out;
}

// The knowledge date is part of every prompt; where a template asks the clock for the other one, it is this one here.
std::string llama3_1(Messages messages, bool generate) {
  std::string system = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
  if (!messages.empty() && messages[0].role == "system") {
    system.append(trim(messages[0].content));
    messages = messages.subspan(1);
  }
  std::string out = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + system + "<|eot_id|>";
  return out.append(llama3(messages, generate), std::string_view("<|begin_of_text|>").size());
}

std::string mistral(Messages messages, ChatStyle style) {
  const bool has_system = !messages.empty() && messages[0].role == "system";
  const std::string system(take_system(messages, style));
  std::string out = "<s>";
  for (size_t i = 0; i < messages.size(); i++) {
    if (messages[i].role == "assistant")
      out.append(" ").append(messages[i].content).append("</s>");
    else
      out.append(" [INST] ").append(i == 0 && has_system ? system + "\n\n" : "").append(messages[i].content).append(" [/INST]");
  }
  return out;
}

// The system message goes to the last user message, if that is the last of all.
std::string mistral_v3(Messages messages, ChatStyle style) {
  const bool has_system = !messages.empty() && messages[0].role == "system";
  const std::string system(take_system(messages, style));
  std::string out = "<s>";
  for (size_t i = 0; i < messages.size(); i++) {
    if (messages[i].role == "assistant") {
      out.append(" ").append(trim(messages[i].content)).append("</s>");
      continue;
    }
    const bool with_system = has_system && i + 1 == messages.size();
    out.append("[INST] ").append(with_system ? system + "\n\n" : "").append(messages[i].content).append("[/INST]");
  }
  return out;
}

// ChatML; with a default system message for chats that do not begin with one.
std::string chatml(Messages messages, bool generate, std::string_view default_system = {}) {
  std::string out;
  const auto turn = [&](std::string_view role, std::string_view content) {
    out.append("<|im_start|>").append(role).append("\n").append(content).append("<|im_end|>\n");
  };
  if (!default_system.empty() && !messages.empty() && messages[0].role != "system") turn("system", default_system);
  for (const Message& message : messages) turn(message.role, message.content);
  return generate ? out.append("<|im_start|>assistant\n") : out;
}

}  // namespace

ChatStyle parse_chat_style(std::string_view wanted) {
  for (const Style& style : kStyles)
    if (style.name == wanted) return style.style;
  fail_input("there is no chat template \"{}\"; choose one of {}", wanted, choices());
}

std::string_view name(ChatStyle wanted) {
  return std::find_if(kStyles.begin(), kStyles.end(), [&](const Style& style) { return style.style == wanted; })->name;
}

ChatStyle recognise_chat_style(std::string_view source) {
  const auto has = [&](std::string_view part) { return source.find(part) != source.npos; };
  if (has("<|im_start|>")) {
    if (has("named SmolLM")) return ChatStyle::smollm2;
    if (has(kQwen25System)) return ChatStyle::qwen2_5;
    if (has("You are a helpful assistant.<|im_end|>")) return ChatStyle::qwen2;
    if (has("You are a helpful assistant<|im_end|>")) return ChatStyle::qwen1_5;
    if (!has("think>") && !has("system\\n")) return ChatStyle::chatml;
  } else if (has("<|start_header_id|>") && has("<|eot_id|>")) {
    return has("Cutting Knowledge Date") ? ChatStyle::llama3_1 : ChatStyle::llama3;
  } else if (has("<｜User｜>") && has("<｜Assistant｜>")) {
    if (!has("think>")) return ChatStyle::deepseek_v3;
  } else if (has("'User: '") && has("'Assistant: '") && has("eos_token")) {
    return ChatStyle::deepseek_v2;
  } else if (has("<<SYS>>") && has("[INST]")) {
    return ChatStyle::llama2;
  } else if (has("[INST]") && has("[AVAILABLE_TOOLS] [")) {
    return ChatStyle::mistral_v3;
  } else if (has("' [INST] '")) {
    return ChatStyle::mistral;
  }
  fail_input("{}; choose one of {}",
             source.empty() ? "the model has no chat template" : "the model's chat template is not one of those known here", choices());
}

std::string chat_prompt(ChatStyle style, std::span<const Message> messages, bool add_generation_prompt) {
  check_roles(messages);
  switch (style) {
    case ChatStyle::deepseek_v2: return deepseek_v2(messages, add_generation_prompt);
    case ChatStyle::deepseek_v3: return deepseek_v3(messages, add_generation_prompt);
    case ChatStyle::llama2: return llama2(messages, style);
    case ChatStyle::llama3: return llama3(messages, add_generation_prompt);
    case ChatStyle::llama3_1: return llama3_1(messages, add_generation_prompt);
    case ChatStyle::mistral: return mistral(messages, style);
    case ChatStyle::mistral_v3: return mistral_v3(messages, style);
    case ChatStyle::chatml: return chatml(messages, add_generation_prompt);
    case ChatStyle::smollm2: return chatml(messages, add_generation_prompt, kSmolSystem);
    case ChatStyle::qwen1_5: return chatml(messages, add_generation_prompt, kQwen15System);
    case ChatStyle::qwen2: return chatml(messages, add_generation_prompt, kQwen2System);
    case ChatStyle::qwen2_5: return chatml(messages, add_generation_prompt, kQwen25System);
  }
  fail("chat style {} is not one", int(style));
}

std::vector<std::string> chat_stops(ChatStyle style) {
  switch (style) {
    case ChatStyle::deepseek_v2:
    case ChatStyle::deepseek_v3: return {std::string(kDeepseekEnd)};
    case ChatStyle::llama2:
    case ChatStyle::mistral:
    case ChatStyle::mistral_v3: return {"</s>"};
    case ChatStyle::llama3:
    case ChatStyle::llama3_1: return {"<|eot_id|>", "<|end_of_text|>"};
    case ChatStyle::chatml:
    case ChatStyle::smollm2:
    case ChatStyle::qwen1_5:
    case ChatStyle::qwen2:
    case ChatStyle::qwen2_5: return {"<|im_end|>", "<|endoftext|>"};
  }
  fail("chat style {} is not one", int(style));
}

}  // namespace mla
