// A builder of JSON values that refuses while it reads, so that nothing large is built first.
#include "io/json.h"

#include "core/check.h"

#include <vector>

namespace mla {
namespace {

using nlohmann::json;

class Builder : public nlohmann::json_sax<json> {
 public:
  Builder(json& root, std::string_view what, int max_depth) : root_(root), what_(what), max_depth_(max_depth) {}

  bool null() override { return add(nullptr), true; }
  bool boolean(bool x) override { return add(x), true; }
  bool number_integer(number_integer_t x) override { return add(x), true; }
  bool number_unsigned(number_unsigned_t x) override { return add(x), true; }
  bool number_float(number_float_t x, const string_t&) override { return add(x), true; }
  bool string(string_t& x) override { return add(std::move(x)), true; }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override { return open(json::object()), true; }
  bool start_array(size_t) override { return open(json::array()), true; }
  bool end_object() override { return open_.pop_back(), true; }
  bool end_array() override { return open_.pop_back(), true; }
  bool key(string_t& name) override {
    if (open_.back()->contains(name)) fail_input("{} has the key {} twice in one object", what_, json(name).dump());
    key_ = std::move(name);
    return true;
  }
  bool parse_error(size_t at, const std::string&, const nlohmann::detail::exception& error) override {
    const std::string_view text = error.what();
    const size_t prefix = text.find("] ");  // the library's own tag
    fail_input("{} is not valid JSON (byte {}): {}", what_, at, prefix == text.npos ? text : text.substr(prefix + 2));
  }

 private:
  json* add(json value) {
    if (open_.empty()) return &(root_ = std::move(value));
    json& parent = *open_.back();
    if (parent.is_object()) return &(parent[key_] = std::move(value));
    parent.push_back(std::move(value));
    return &parent.back();
  }
  void open(json empty) {
    if (int(open_.size()) >= max_depth_) fail_input("{} is nested deeper than {} levels", what_, max_depth_);
    open_.push_back(add(std::move(empty)));
  }

  json& root_;
  std::string_view what_;
  int max_depth_;
  std::string key_;
  std::vector<json*> open_;  // a parent does not grow while a child is open, so these stay valid
};

}  // namespace

json parse_json(std::string_view text, std::string_view what, int max_depth) {
  json root;
  Builder builder(root, what, max_depth);
  json::sax_parse(text.begin(), text.end(), &builder);
  return root;
}

}  // namespace mla
