// UTF-8, the character classes that tokenizers ask for, and canonical composition (NFC).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace mla {

// Bytes of the character the text starts with; 0 when these bytes are not valid UTF-8 (overlong, surrogate, past U+10FFFF, cut off).
size_t utf8_length(std::string_view text);
char32_t utf8_decode(std::string_view character);  // of one valid character
void append_utf8(std::string& out, char32_t c);

size_t valid_prefix(std::string_view text);       // bytes of valid UTF-8 the text starts with
size_t invalid_prefix(std::string_view text);     // bytes at the start with which no valid character begins
size_t incomplete_suffix(std::string_view text);  // 0 to 3 bytes at the end that begin a character and lack the rest

bool is_space(char32_t c);  // Unicode White_Space
bool is_word(char32_t c);   // letter, mark, decimal digit, letter number or connector

// Unicode normalization form C of the valid parts; invalid bytes stay as they are and nothing composes across them.
std::string nfc(std::string_view text);

}  // namespace mla
