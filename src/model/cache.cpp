// Pages with reference counts, and sequences as lists of them.
#include "model/cache.h"

#include "core/check.h"

#include <utility>

namespace mla {

PagePool::PagePool(int32_t pages) : references_(size_t(pages), 0) {
  for (int32_t page = pages - 1; page >= 0; --page) free_.push_back(page);
}

int32_t PagePool::take() {
  if (free_.empty()) return -1;
  const int32_t page = free_.back();
  free_.pop_back();
  references_[size_t(page)] = 1;
  return page;
}

void PagePool::share(int32_t page) {
  CHECK(references(page) > 0, "page {} is free", page);
  ++references_[size_t(page)];
}

void PagePool::free(int32_t page) {
  CHECK(references(page) > 0, "page {} is free already", page);
  if (--references_[size_t(page)] == 0) free_.push_back(page);
}

int32_t PagePool::references(int32_t page) const {
  CHECK(page >= 0 && page < size(), "page {} of {}", page, size());
  return references_[size_t(page)];
}

namespace {
double page_bytes(int layers, const KvFormat& format) { return double(layers) * LatentCache::page_tokens * double(format.row_bytes()); }

int32_t pages_for(int64_t tokens, double page_bytes, const Memory& memory) {
  const int64_t pages = (tokens + LatentCache::page_tokens - 1) / LatentCache::page_tokens;
  if (tokens < 1 || pages > INT32_MAX) fail_input("a cache of {} tokens is not possible", tokens);
  // A host may have more than is free; a device has not.
  const double bytes = double(pages) * page_bytes, free = memory.free_bytes();
  if (memory.place() != Place::host && bytes > free)
    fail_input("a cache of {} tokens takes {:.4g} GB, and the device has {:.4g} GB free; {} tokens would fit", tokens, 1e-9 * bytes,
               1e-9 * free, int64_t(free / page_bytes) * LatentCache::page_tokens);
  return int32_t(pages);
}
}  // namespace

LatentCache::LatentCache(int layers, KvFormat format, int64_t tokens, Memory& memory)
    : layers_(layers),
      format_(format),
      pool_(pages_for(tokens, page_bytes(layers, format), memory)),
      source_(&memory),
      memory_(size_t(pool_.size()) * size_t(page_bytes(layers, format)), memory) {}

const LatentCache::Sequence& LatentCache::at(int sequence) const {
  CHECK(sequence >= 0 && size_t(sequence) < sequences_.size() && sequences_[size_t(sequence)].open, "no sequence {}", sequence);
  return sequences_[size_t(sequence)];
}

LatentCache::Sequence& LatentCache::at(int sequence) { return const_cast<Sequence&>(std::as_const(*this).at(sequence)); }

int LatentCache::open() {
  size_t i = 0;
  while (i < sequences_.size() && sequences_[i].open) ++i;
  if (i == sequences_.size()) sequences_.emplace_back();
  sequences_[i] = {true, 0, {}};
  return int(i);
}

void LatentCache::copy_page(int32_t from, int32_t to) {
  for (int l = 0; l < layers_; ++l) {
    const Kv kv = layer(l);
    source_->copy(kv.row(from, 0), kv.row(to, 0), size_t(kv.page_bytes));
  }
}

int LatentCache::fork(int sequence) {
  const bool partial = at(sequence).length % page_tokens != 0;
  const int32_t own = partial ? pool_.take() : -1;
  if (partial && own < 0) return -1;
  const int copy = open();
  Sequence &to = at(copy), &from = at(sequence);
  to.length = from.length;
  to.pages = from.pages;
  if (partial) {
    copy_page(from.pages.back(), own);
    to.pages.back() = own;
  }
  for (size_t i = 0; i < to.pages.size() - size_t(partial); ++i) pool_.share(to.pages[i]);
  return copy;
}

void LatentCache::close(int sequence) {
  truncate(sequence, 0);
  at(sequence).open = false;
}

bool LatentCache::grow(int sequence, int64_t n) {
  CHECK(n >= 0, "{} tokens", n);
  Sequence& s = at(sequence);
  const int64_t pages = (s.length + n + page_tokens - 1) / page_tokens, more = pages - int64_t(s.pages.size());
  // The last page may be shared if the sequence was cut inside it: writing needs a page of its own.
  const bool copy = n > 0 && s.length % page_tokens != 0 && pool_.references(s.pages.back()) > 1;
  if (more + copy > pool_.available()) return false;
  if (copy) {
    const int32_t own = pool_.take();
    copy_page(s.pages.back(), own);
    pool_.free(s.pages.back());
    s.pages.back() = own;
  }
  for (int64_t i = 0; i < more; ++i) s.pages.push_back(pool_.take());
  s.length += n;
  return true;
}

void LatentCache::truncate(int sequence, int64_t length) {
  Sequence& s = at(sequence);
  CHECK(length >= 0 && length <= s.length, "sequence {} has {} tokens, not {}", sequence, s.length, length);
  const auto pages = size_t((length + page_tokens - 1) / page_tokens);
  while (s.pages.size() > pages) {
    pool_.free(s.pages.back());
    s.pages.pop_back();
  }
  s.length = length;
}

int64_t LatentCache::length(int sequence) const { return at(sequence).length; }

const std::vector<int32_t>& LatentCache::pages(int sequence) const { return at(sequence).pages; }

int64_t LatentCache::slot(int sequence, int64_t position) const {
  const Sequence& s = at(sequence);
  CHECK(position >= 0 && position < s.length, "position {} of {}", position, s.length);
  return int64_t(s.pages[size_t(position / page_tokens)]) * page_tokens + position % page_tokens;
}

Kv LatentCache::layer(int index) const {
  CHECK(index >= 0 && index < layers_, "layer {} of {}", index, layers_);
  const int64_t page_bytes = page_tokens * format_.row_bytes();
  return {format_, memory_.data() + index * pool_.size() * page_bytes, page_bytes, page_tokens};
}

}  // namespace mla
