// Encoding and decoding: added tokens first, then the steps before BPE, then each word through the merges, with a cache of words.
#include "text/tokenizer.h"

#include "core/check.h"
#include "text/state.h"
#include "text/unicode.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

namespace mla {

namespace {

// Words seen in this text and their ids. Words repeat, so most of a text is looked up here.
class WordCache {
 public:
  // The ids of a word, or null.
  const std::span<const int32_t>* find(std::string_view word, size_t hash) {
    if (slots_.empty()) return nullptr;
    const Slot& slot = slots_[hash & (slots_.size() - 1)];
    if (slot.hash != hash || slot.word.size() != word.size() || std::memcmp(slot.word.data(), word.data(), word.size()) != 0)
      return nullptr;
    return &slot.ids;
  }

  void put(std::string_view word, size_t hash, std::span<const int32_t> ids) {
    if (word.size() > kLongestWord) return;
    if (words_.blocks.size() + ids_.blocks.size() > kMostBlocks) *this = WordCache();
    if (slots_.size() < kSlots && ++put_ > slots_.size() / 2) grow();
    slots_[hash & (slots_.size() - 1)] = {
        hash, {words_.keep(word.data(), word.size()), word.size()}, {ids_.keep(ids.data(), ids.size()), ids.size()}};
  }

 private:
  static constexpr size_t kLongestWord = 64, kSlots = 1 << 15, kBlock = 1 << 14, kMostBlocks = 256;
  struct Slot {
    size_t hash = 0;
    std::string_view word;
    std::span<const int32_t> ids;
  };

  // Memory that grows in blocks and never moves; words that lost their slot stay until there are too many blocks.
  template <class T>
  struct Blocks {
    std::vector<std::unique_ptr<T[]>> blocks;
    size_t used = 0;

    const T* keep(const T* from, size_t n) {
      if (blocks.empty() || used + n > kBlock) {
        blocks.push_back(std::make_unique<T[]>(kBlock));
        used = 0;
      }
      T* to = blocks.back().get() + used;
      std::copy_n(from, n, to);
      used += n;
      return to;
    }
  };

  void grow() {
    std::vector<Slot> old(std::max<size_t>(256, 4 * slots_.size()));
    old.swap(slots_);
    for (const Slot& slot : old)
      if (!slot.word.empty()) slots_[slot.hash & (slots_.size() - 1)] = slot;
  }

  std::vector<Slot> slots_;
  size_t put_ = 0;
  Blocks<char> words_;
  Blocks<int32_t> ids_;
};

class Encoder {
 public:
  Encoder(const Tokenizer::State& state, size_t text_bytes) : state_(state), budget_(text_bytes) {}

  std::vector<int32_t> run(std::string_view text, bool parse_special) {
    ids_.reserve(text.size() / 4 + 8);
    state_.plain.split(text, parse_special, [&](size_t begin, size_t end, const AddedToken* token) {
      if (token) return ids_.push_back(token->id);
      run_steps(state_.normalizer, {text.substr(begin, end - begin), begin == 0}, budget_,
                [&](Piece piece) { split_normalized(piece, parse_special); });
    });
    return std::move(ids_);
  }

 private:
  void split_normalized(Piece piece, bool parse_special) {
    state_.normalized.split(piece.text, parse_special, [&](size_t begin, size_t end, const AddedToken* token) {
      if (token) return ids_.push_back(token->id);
      run_steps(state_.pre_tokenizer, {piece.text.substr(begin, end - begin), piece.first && begin == 0}, budget_,
                [&](Piece cut) { encode_words(cut.text); });
    });
  }

  // Sentencepiece-style models take a whole text as one word. Where no merge can cross from a word into the next space, cutting there
  // changes nothing and makes words that repeat.
  void encode_words(std::string_view text) {
    if (state_.byte_level || state_.merges_cross_spaces || !state_.words.empty() || !state_.has_metaspace) return encode_word(text);
    size_t begin = 0;
    for (size_t at = text.find(kMetaspace); at != std::string_view::npos; at = text.find(kMetaspace, at + kMetaspace.size())) {
      const bool behind_space = at >= kMetaspace.size() && text.substr(at - kMetaspace.size(), kMetaspace.size()) == kMetaspace;
      if (at == begin || behind_space) continue;
      encode_word(text.substr(begin, at - begin));
      begin = at;
    }
    encode_word(text.substr(begin));
  }

  void encode_word(std::string_view word) {
    if (word.empty()) return;
    const size_t hash = std::hash<std::string_view>()(word);
    if (const auto* ids = cache_.find(word, hash)) {
      ids_.insert(ids_.end(), ids->begin(), ids->end());
      return;
    }
    const size_t from = ids_.size();
    const auto whole = state_.words.empty() ? state_.words.end() : state_.words.find(std::string(word));
    if (whole != state_.words.end()) {
      ids_.push_back(whole->second);
    } else {
      if (state_.byte_level)
        add_bytes(word);
      else
        add_characters(word);
      state_.merges.merge(ids_, from);
    }
    cache_.put(word, hash, std::span(ids_).subspan(from));
  }

  void add_bytes(std::string_view word) {
    for (unsigned char byte : word) {
      if (state_.byte_ids[byte] >= 0)
        ids_.push_back(state_.byte_ids[byte]);
      else if (!is_replacement_)
        add_replacement();
    }
  }

  // A byte that the vocabulary cannot spell appears as U+FFFD, the usual sign for a broken character.
  void add_replacement() {
    is_replacement_ = true;
    add_bytes("\xEF\xBF\xBD");
    is_replacement_ = false;
  }

  void add_characters(std::string_view word) {
    bool after_unknown = false;
    for (size_t i = 0; i < word.size();) {
      const size_t length = std::max<size_t>(1, utf8_length(word.substr(i, 4)));
      const std::string_view character = word.substr(i, length);
      i += length;
      const auto at = state_.symbols.find(std::string(character));
      const bool known = at != state_.symbols.end();
      if (known) {
        ids_.push_back(at->second);
      } else if (std::all_of(character.begin(), character.end(), [&](unsigned char b) { return state_.byte_ids[b] >= 0; })) {
        for (unsigned char byte : character) ids_.push_back(state_.byte_ids[byte]);
        after_unknown = false;
        continue;
      } else if (state_.unknown >= 0 && !(after_unknown && state_.fuse_unknown)) {
        ids_.push_back(state_.unknown);
      }
      after_unknown = !known;
    }
  }

  const Tokenizer::State& state_;
  MatchBudget budget_;
  WordCache cache_;
  std::vector<int32_t> ids_;
  bool is_replacement_ = false;
};

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<State> state) : state_(std::move(state)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special, bool parse_special) const {
  if (text.size() > size_t(std::numeric_limits<int32_t>::max()) / 4)
    fail_input("a text of {} bytes is too long to tokenize at once; split it", text.size());
  std::vector<int32_t> ids = Encoder(*state_, text.size()).run(text, parse_special);
  if (add_special) {
    ids.insert(ids.begin(), state_->front.begin(), state_->front.end());
    ids.insert(ids.end(), state_->back.begin(), state_->back.end());
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  TextStream stream(*this, skip_special);
  std::string text;
  for (int32_t id : ids) text += stream.push(id);
  return text += stream.flush();
}

int32_t Tokenizer::vocab_size() const { return int32_t(state_->spellings.size()); }

std::string_view Tokenizer::token(int32_t id) const {
  if (id < 0 || id >= vocab_size()) fail_input("there is no token {}; ids go from 0 to {}", id, vocab_size() - 1);
  return state_->spellings[size_t(id)];
}

std::optional<int32_t> Tokenizer::find(std::string_view spelling) const { return state_->find(spelling); }
int32_t Tokenizer::bos() const { return state_->bos; }
int32_t Tokenizer::eos() const { return state_->eos; }
bool Tokenizer::adds_bos() const { return state_->bos >= 0 && !state_->front.empty() && state_->front[0] == state_->bos; }
bool Tokenizer::is_special(int32_t id) const { return id >= 0 && id < vocab_size() && state_->special[size_t(id)]; }
const std::string& Tokenizer::chat_template() const { return state_->chat_template; }

std::string TextStream::push(int32_t id) {
  const Tokenizer::State& state = *tokenizer_.state_;
  if (id < 0 || id >= tokenizer_.vocab_size() || (skip_special_ && state.special[size_t(id)])) return {};
  const std::string& bytes = state.bytes[size_t(id)];
  // The space that encoding puts in front of a text goes away again.
  const size_t skip = started_ ? 0 : std::min(bytes.find_first_not_of(' '), std::min(state.strip, bytes.size()));
  started_ = started_ || !bytes.empty();
  pending_.append(bytes, skip);
  const size_t ready = pending_.size() - incomplete_suffix(pending_);
  std::string out = pending_.substr(0, ready);
  pending_.erase(0, ready);
  return out;
}

std::string TextStream::flush() {
  started_ = false;
  return std::exchange(pending_, {});
}

}  // namespace mla
