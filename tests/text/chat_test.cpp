// Chat prompts against what HF transformers renders (tools/make_chat_goldens.py), and how templates are told apart.
#include "text/chat.h"
#include "core/check.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <fstream>
#include <set>

namespace {

using mla::ChatStyle;

TEST(Chat, PromptsAreThoseOfTransformers) {
  const auto cases = nlohmann::json::parse(std::ifstream(MLA_TEST_DATA "/text/chat.json"));
  std::set<std::string> styles;
  for (const auto& golden : cases) {
    std::vector<mla::Message> messages;
    for (const auto& message : golden.at("messages")) messages.push_back({message.at("role"), message.at("content")});
    const ChatStyle style = mla::parse_chat_style(golden.at("style").get<std::string>());
    EXPECT_EQ(mla::chat_prompt(style, messages, golden.at("generate")), golden.at("prompt").get<std::string>()) << golden.dump();
    EXPECT_EQ(mla::name(style), golden.at("style").get<std::string>());
    EXPECT_FALSE(mla::chat_stops(style).empty());
    styles.insert(golden.at("style"));
  }
  EXPECT_EQ(styles.size(), 12u);
}

// What gives each published template away.
TEST(Chat, RecognisesTemplates) {
  const std::vector<std::pair<const char*, ChatStyle>> parts = {
      {"{{ 'User: ' + message['content'] }}{{ 'Assistant: ' + message['content'] + eos_token }}", ChatStyle::deepseek_v2},
      {"{{'<｜User｜>' + message['content']}}{{'<｜Assistant｜>'}}", ChatStyle::deepseek_v3},
      {"{{ bos_token + '[INST] ' + '<<SYS>>\\n' }}", ChatStyle::llama2},
      {"'<|start_header_id|>' + message['role'] + '<|eot_id|>'", ChatStyle::llama3},
      {"\"Cutting Knowledge Date: December 2023\\n\" '<|start_header_id|>' '<|eot_id|>'", ChatStyle::llama3_1},
      {"{{- ' [INST] ' + message['content'] + ' [/INST]' }}", ChatStyle::mistral},
      {"{{- \"[AVAILABLE_TOOLS] [\" }}{{- \"[INST] \" }}", ChatStyle::mistral_v3},
      {"{{'<|im_start|>' + message['role'] + '\\n'}}", ChatStyle::chatml},
      {"<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>", ChatStyle::smollm2},
      {"'<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n'", ChatStyle::qwen1_5},
      {"'<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n'", ChatStyle::qwen2},
      {"'<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n'", ChatStyle::qwen2_5},
  };
  for (const auto& [part, style] : parts) EXPECT_EQ(mla::recognise_chat_style(part), style) << part;
}

TEST(Chat, UnknownTemplatesNameTheChoices) {
  for (const char* source : {"", "{% for i in range(10**9) %}{{ i }}{% endfor %}", "<|im_start|> <think>", "{{ 'GPT4 Correct User: ' }}",
                             "<｜User｜><｜Assistant｜><think>\\n", "<|im_start|>system\\nYou are someone else<|im_end|>"}) {
    try {
      mla::recognise_chat_style(source);
      FAIL() << source;
    } catch (const mla::Error& error) {
      EXPECT_EQ(error.kind(), mla::ErrorKind::input);
      EXPECT_NE(std::string(error.what()).find("deepseek-v2, deepseek-v3, llama2"), std::string::npos) << error.what();
    }
  }
  EXPECT_THROW(mla::parse_chat_style("llama9"), mla::Error);
}

TEST(Chat, RefusesRolesTheTemplateDoesNotKnow) {
  const std::vector<mla::Message> tool = {{"tool", "x"}}, twice = {{"user", "x"}, {"user", "y"}};
  EXPECT_THROW(mla::chat_prompt(ChatStyle::chatml, tool), mla::Error);
  EXPECT_THROW(mla::chat_prompt(ChatStyle::llama2, twice), mla::Error);
  EXPECT_THROW(mla::chat_prompt(ChatStyle::mistral, twice), mla::Error);
  EXPECT_NO_THROW(mla::chat_prompt(ChatStyle::llama3, twice));
}

}  // namespace
