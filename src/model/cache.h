// The cache of a model: a pool of pages with reference counts, shared by sequences that grow, fork and close.
#pragma once

#include "core/memory.h"
#include "device/attention.h"

#include <cstdint>
#include <vector>

namespace mla {

// Hands out page numbers 0 … pages-1. Knows nothing of what is in them.
class PagePool {
 public:
  explicit PagePool(int32_t pages);
  int32_t take();            // with one reference; -1 when none is left
  void share(int32_t page);  // one more reference
  void free(int32_t page);   // one reference less
  int32_t references(int32_t page) const;
  int32_t available() const { return int32_t(free_.size()); }
  int32_t size() const { return int32_t(references_.size()); }

 private:
  std::vector<int32_t> references_, free_;
};

// Rows of all layers for many sequences: [layers, pages, 64 tokens, row]. Pages that no sequence holds are reused.
class LatentCache {
 public:
  static constexpr int page_tokens = 64;

  // Room for `tokens` tokens in all, rounded up to pages. Memory is touched when it is first written.
  LatentCache(int layers, KvFormat format, int64_t tokens, Memory& memory = host_memory());

  int open();              // a new empty sequence; its number
  int fork(int sequence);  // a copy that shares full pages; a partly filled last page is copied. -1: no pages left
  void close(int sequence);
  // Makes room for n more tokens and counts them as present; false, and nothing changes, when the pool has too few pages.
  bool grow(int sequence, int64_t n);
  void truncate(int sequence, int64_t length);  // forgets the tokens from `length` on
  int64_t length(int sequence) const;
  const std::vector<int32_t>& pages(int sequence) const;
  int64_t slot(int sequence, int64_t position) const;  // page * page_tokens + offset

  Kv layer(int index) const;
  const KvFormat& format() const { return format_; }
  int layers() const { return layers_; }
  int64_t bytes_per_token() const { return layers_ * format_.row_bytes(); }
  int64_t free_tokens() const { return int64_t(pool_.available()) * page_tokens; }

 private:
  struct Sequence {
    bool open = false;
    int64_t length = 0;
    std::vector<int32_t> pages;
  };
  const Sequence& at(int sequence) const;
  Sequence& at(int sequence);
  void copy_page(int32_t from, int32_t to);  // in all layers

  int layers_;
  KvFormat format_;
  PagePool pool_;
  Memory* source_;
  Buffer memory_;
  std::vector<Sequence> sequences_;
};

}  // namespace mla
