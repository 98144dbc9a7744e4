// Starts the program with pipes on all three of its streams.
#include "program.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstring>
#include <fstream>

namespace mla::test {
namespace {

struct Pipe {
  int read = -1, write = -1;
  Pipe() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("no pipe");
    read = ends[0], write = ends[1];
  }
};

pid_t start(const std::vector<std::string>& arguments, const Pipe& in, const Pipe& out, const Pipe& err) {
  std::vector<char*> argv{const_cast<char*>(MLA_PROGRAM)};
  for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  const pid_t child = fork();
  if (child != 0) return child;
  dup2(in.read, STDIN_FILENO);
  dup2(out.write, STDOUT_FILENO);
  dup2(err.write, STDERR_FILENO);
  signal(SIGPIPE, SIG_DFL);
  execv(MLA_PROGRAM, argv.data());
  _exit(127);
}

}  // namespace

Outcome run(const Call& call) {
  signal(SIGPIPE, SIG_IGN);
  const Pipe in, out, err;
  const pid_t child = start(call.arguments, in, out, err);
  close(in.read), close(out.write), close(err.write);
  // Inputs of these tests fit a pipe's buffer.
  if (!call.input.empty() && ::write(in.write, call.input.data(), call.input.size()) < 0) ADD_FAILURE() << "stdin: " << strerror(errno);
  close(in.write);
  Outcome outcome;
  bool waiting = bool(call.interrupt_when);
  int idle = 0;
  std::array<pollfd, 2> ends{{{out.read, POLLIN, 0}, {err.read, POLLIN, 0}}};
  while (ends[0].fd >= 0 || ends[1].fd >= 0) {
    const int ready = poll(ends.data(), ends.size(), 50);
    idle = ready == 0 ? idle + 1 : 0;
    if (ready < 0 || idle > 20 * 240) {
      ADD_FAILURE() << "the program does not end";
      kill(child, SIGKILL);
      break;
    }
    for (size_t i = 0; i < 2; ++i) {
      if (ends[i].fd < 0 || ends[i].revents == 0) continue;
      char buffer[65536];
      const ssize_t n = read(ends[i].fd, buffer, sizeof buffer);
      if (n <= 0)
        close(ends[i].fd), ends[i].fd = -1;
      else
        (i == 0 ? outcome.out : outcome.err).append(buffer, size_t(n));
    }
    if (waiting && call.interrupt_when(outcome)) kill(child, SIGINT), waiting = false;
  }
  int status = 0;
  waitpid(child, &status, 0);
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  return outcome;
}

Outcome run(std::vector<std::string> arguments, std::string input) { return run(Call{std::move(arguments), std::move(input)}); }

Json Outcome::json() const {
  const Json parsed = Json::parse(out, nullptr, false);
  EXPECT_TRUE(parsed.is_object()) << "not one JSON object: " << out << err;
  return parsed;
}

std::string path(const std::string& name) { return (scratch() / name).string(); }

fs::path scratch() {
  static const struct Folder {
    fs::path path = fs::temp_directory_path() / ("mla-cli-test-" + std::to_string(getpid()));
    Folder() { fs::create_directories(path); }
    ~Folder() {
      std::error_code ignored;
      fs::remove_all(path, ignored);
    }
  } folder;
  return folder.path;
}

fs::path golden(const std::string& name) { return fs::path(MLA_TEST_DATA) / "golden" / name; }

namespace {
std::string make_model(const std::string& name, const Json& changes) {
  // A byte vocabulary needs at least its bytes and a few control tokens.
  Json config = Json::parse(read_text(golden("dsv2-q-group") / "config.json"));
  config.update({{"vocab_size", 320}, {"bos_token_id", 0}, {"eos_token_id", 1}});
  config.update(changes);
  write_text(scratch() / (name + ".json"), config.dump());
  const fs::path model = scratch() / (name + ".gguf");
  const Outcome made = run({"init", (scratch() / (name + ".json")).string(), "-o", model.string(), "--type", "f32"});
  EXPECT_EQ(made.code, 0) << made.err;
  return model.string();
}
}  // namespace

std::string small_model() {
  static const std::string path = make_model("small", Json::object());
  return path;
}

std::string deep_model() {
  static const std::string path =
      make_model("deep", {{"num_hidden_layers", deep_layers}, {"num_attention_heads", 16}, {"num_key_value_heads", 16}});
  return path;
}

void write_text(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

std::string read_text(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in) << path;
  return {std::istreambuf_iterator<char>(in), {}};
}

namespace {
std::string npy_of(const char* type, const std::string& shape, const void* data, size_t bytes) {
  std::string header = std::string("{'descr': '") + type + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.resize(118, ' ');
  header.back() = '\n';
  return std::string("\x93NUMPY\x01\x00\x76\x00", 10) + header + std::string(static_cast<const char*>(data), bytes);
}
}  // namespace

void write_ids(const fs::path& path, const std::vector<int32_t>& ids) {
  write_text(path, npy_of("<i4", std::to_string(ids.size()) + ",", ids.data(), ids.size() * 4));
}

void write_floats(const fs::path& path, const std::vector<float>& values, int64_t rows, int64_t cols) {
  write_text(path, npy_of("<f4", std::to_string(rows) + ", " + std::to_string(cols), values.data(), values.size() * 4));
}

namespace {
// The data of a .npy file, and the numbers in its shape.
std::string npy(const fs::path& path, const char* type, std::vector<int64_t>& shape) {
  const std::string bytes = read_text(path);
  if (bytes.size() < 10) return ADD_FAILURE() << path, std::string();
  const size_t begin = 10 + size_t(uint8_t(bytes[8])) + 256 * size_t(uint8_t(bytes[9]));
  const std::string header = bytes.substr(10, begin - 10);
  EXPECT_NE(header.find(type), std::string::npos) << header;
  const size_t open = header.find('('), end = header.find(')');
  std::string number;
  for (size_t i = open + 1; i <= end; ++i) {
    if (isdigit(header[i]))
      number += header[i];
    else if (!number.empty())
      shape.push_back(std::stoll(number)), number.clear();
  }
  return bytes.substr(begin);
}
}  // namespace

std::vector<float> read_floats(const fs::path& path, int64_t& rows, int64_t& cols) {
  std::vector<int64_t> shape;
  const std::string data = npy(path, "<f4", shape);
  EXPECT_EQ(shape.size(), 2u);
  rows = shape.at(0), cols = shape.at(1);
  std::vector<float> values(data.size() / 4);
  std::memcpy(values.data(), data.data(), values.size() * 4);
  EXPECT_EQ(int64_t(values.size()), rows * cols);
  return values;
}

std::vector<int32_t> read_ids(const fs::path& path) {
  std::vector<int64_t> shape;
  const std::string data = npy(path, "<i4", shape);
  std::vector<int32_t> values(data.size() / 4);
  std::memcpy(values.data(), data.data(), values.size() * 4);
  return values;
}

void expect_refused(const std::vector<std::string>& arguments, const std::vector<std::string>& said) {
  const Outcome o = run(arguments);
  std::string line;
  for (const std::string& a : arguments) line += " " + a;
  EXPECT_EQ(o.code, 2) << line << "\n" << o.err;
  EXPECT_TRUE(o.out.empty()) << line << "\n" << o.out;
  EXPECT_TRUE(o.err.starts_with("mla: error: ")) << line << "\n" << o.err;
  EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << line << "\n" << o.err;
  for (const std::string& words : said) EXPECT_NE(o.err.find(words), std::string::npos) << line << "\n" << o.err << "lacks: " << words;
}

}  // namespace mla::test
