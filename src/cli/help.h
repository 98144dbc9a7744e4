// How --help looks, and how CLI11's complaints read as sentences.
#pragma once

#include <string>

namespace CLI {
class App;
}

namespace mla {

// --help, --version and the layout of help for the program and all commands added later.
void prepare_help(CLI::App& program);

// A command with its summary and the examples shown below its options.
CLI::App& add_command(CLI::App& program, const std::string& name, const std::string& summary, const std::string& examples);

// The help of the command that was asked about, or of the program.
std::string help_text(const CLI::App& program);

// "The following argument was not expected: --foo" → "unexpected argument --foo".
std::string usage_problem(const std::string& message);

}  // namespace mla
