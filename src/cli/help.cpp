// Help on a page: what the command does, how it is called, its options in two columns, and examples.
#include "cli/help.h"

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <regex>
#include <sstream>

namespace mla {
namespace {

constexpr size_t column = 30, page = 100;

// Text in the right-hand column, broken between words.
std::string wrapped(const std::string& left, const std::string& text) {
  std::string out = fmt::format("  {}", left);
  size_t at = out.size();
  auto new_line = [&] {
    out += '\n' + std::string(column, ' ');
    at = column;
  };
  if (at + 2 > column)
    new_line();
  else
    out += std::string(column - at, ' '), at = column;
  std::istringstream words(text);
  std::string word;
  bool first = true;
  while (words >> word) {
    if (!first && at + 1 + word.size() > page) new_line(), first = true;
    if (!first) out += ' ', ++at;
    out += word, at += word.size(), first = false;
  }
  return out + '\n';
}

class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_help(const CLI::App* app, std::string, CLI::AppFormatMode) const override {
    std::string out = fmt::format("{}\n\nusage: {}\n", app->get_description(), usage(*app));
    for (const std::string& group : groups(*app)) {
      out += fmt::format("\n{}\n", group);
      for (const CLI::Option* option : app->get_options())
        if (option->get_group() == group) out += wrapped(spelling(*option), option->get_description());
    }
    if (app->get_parent() == nullptr) {
      out += "\ncommands\n";
      for (const CLI::App* command : app->get_subcommands([](const CLI::App*) { return true; }))
        out += wrapped(command->get_name(), command->get_description());
    }
    return fmt::format("{}\n{}\n", out, app->get_footer());
  }

 private:
  static std::string usage(const CLI::App& app) {
    if (app.get_parent() == nullptr) return "mla COMMAND [OPTIONS]";
    std::string out = fmt::format("mla {}", app.get_name());
    for (const CLI::Option* option : app.get_options())
      if (option->get_positional())
        out += option->get_required() ? fmt::format(" {}", option->get_name(true)) : fmt::format(" [{}]", option->get_name(true));
    return out + " [OPTIONS]";
  }

  static std::vector<std::string> groups(const CLI::App& app) {
    std::vector<std::string> found;
    for (const CLI::Option* option : app.get_options()) {
      const std::string group = option->get_group();
      if (!group.empty() && std::find(found.begin(), found.end(), group) == found.end()) found.push_back(group);
    }
    // Where and how a model runs reads the same for every command, and comes last.
    std::stable_partition(found.begin(), found.end(), [](const std::string& group) { return group != "machine"; });
    return found;
  }

  static std::string spelling(const CLI::Option& option) {
    if (option.get_positional()) return option.get_name(true);
    std::string out = option.get_name(false, true);
    if (const size_t comma = out.find(','); comma != std::string::npos) out.replace(comma, 1, ", ");
    return option.get_option_text().empty() ? out : fmt::format("{} {}", out, option.get_option_text());
  }
};

}  // namespace

void prepare_help(CLI::App& program) {
  program.formatter(std::make_shared<HelpFormatter>());
  program.option_defaults()->group("options");
  program.set_help_flag("-h,--help", "show this help")->group("options");
  program.set_version_flag("--version", "mla 0.1.0", "show the version")->group("options");
  program.require_subcommand(1);
  program.footer(
      "MODEL is a Hugging Face folder or a GGUF file. mla COMMAND --help explains a command.\n\n"
      "examples\n"
      "  mla run model.gguf --prompt \"Once upon a time\" -n 100\n"
      "  mla chat model.gguf\n"
      "  mla inspect deepseek-v2/config.json --memory 640G");
}

CLI::App& add_command(CLI::App& program, const std::string& name, const std::string& summary, const std::string& examples) {
  CLI::App& command = *program.add_subcommand(name, summary);
  command.get_help_ptr()->group("");
  command.footer("examples\n" + examples);
  return command;
}

std::string help_text(const CLI::App& program) {
  const auto chosen = program.get_subcommands();
  return chosen.empty() ? program.help() : chosen.front()->help();
}

std::string usage_problem(const std::string& message) {
  static const std::pair<std::regex, const char*> known[] = {
      {std::regex("The following arguments? w(?:as|ere) not expected: (.*)"), "unexpected argument $1"},
      {std::regex("Could not convert: (\\S+) = (.*)"), "$1 is \"$2\"; give a number"},
      {std::regex("(\\S+): 1 required \\S+ missing"), "$1 needs a value"},
      {std::regex("(.*) is required"), "$1 is missing"},
  };
  for (const auto& [theirs, ours] : known)
    if (std::regex_match(message, theirs)) return std::regex_replace(message, theirs, ours);
  return message;
}

}  // namespace mla
