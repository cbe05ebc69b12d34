// The program: a table of verbs, their common flags, and the one place that turns errors into messages and exit codes.
#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <list>
#include <thread>

#include "cli/command.h"
#include "cli/commit.h"
#include "cli/memory_limit.h"
#include "cli/products.h"
#include "cli/streams.h"
#include "cli/threads.h"
#include "moesaic/base/device.h"
#include "moesaic/base/file_errors.h"
#include "moesaic/base/file_memory.h"
#include "moesaic/base/json.h"
#include "moesaic/base/log.h"

namespace moesaic::cli {
namespace {

struct Verb {
  const char* name;
  const char* summary;
  AddVerb add;
};

constexpr Verb kVerbs[] = {
    {"train", "Train an adapter (or the whole model) from a run file", add_train},
    {"compose", "Join frozen models by cross-attention, to be trained with `train`", add_compose},
    {"convert", "A checkpoint of the paper's released code as a composition", add_convert},
    {"upcycle", "A sparse mixture-of-experts model made out of dense ones", add_upcycle},
    {"merge", "Fold an adapter with one expert into its base model", add_merge},
    {"mix", "LoRAs you have as the experts of one MoLoRA, without training", add_mix},
    {"export", "A model or adapter in the form transformers or PEFT load", add_export},
    {"generate", "Answer one prompt or a file of prompts", add_generate},
    {"chat", "Talk with a model in the terminal", add_chat},
    {"serve", "Answer over HTTP as OpenAI's API does, every request with its own mixture of adapters", add_serve},
    {"score", "Log-probability of every token of a text", add_score},
    {"eval", "Score a model on task files: rank classification and generation", add_eval},
    {"compare", "Runs side by side: what they differ in, what came of it; a table, a page, CSV and JSON", add_compare},
    {"study", "Methods x settings x seeds: every run of a grid, rates chosen first, and one report of all", add_study},
    {"routes", "What routers and connections do: experts of each task and token, or what an anchor reads", add_routes},
    {"inspect", "What is in a file or folder; what a method would train", add_inspect},
    {"models", "The models, adapters and compositions at hand, and whether they fit this machine", add_models},
    {"data", "Look at training data: preview a run, validate a file, write the demo's skills", add_data},
    {"demo", "The main job on a real model: train a MoLoRA on small skills, before and after", add_demo},
    {"doctor", "What this machine offers: devices, threads, number formats, versions", add_doctor},
};

/// More than these only wait for each other.
int most_threads() { return std::max(64, 4 * static_cast<int>(std::thread::hardware_concurrency())); }

void add_common_options(CLI::App& app, CommonOptions& common) {
  const char* group = "Common";
  app.add_option("--log-level", common.log_level, "trace, debug, info, warning, error or off")
      ->capture_default_str()
      ->group(group);
  app.add_option("--threads", common.threads, "CPU threads; 0 takes the cores this process may use")
      ->capture_default_str()
      ->check(CLI::Range(0, most_threads()))
      ->group(group);
  app.add_option("--device", common.device, "auto, cpu, cuda or cuda:N")->capture_default_str()->group(group);
  app.add_option("--dtype", common.dtype, "auto, float32 or bfloat16: number format of the frozen model")
      ->capture_default_str()
      ->group(group);
  app.add_option("--seed", common.seed, "Seed of everything random")->capture_default_str()->group(group);
}

int fail(ExitCode code, const std::string& message) {
  std::fflush(stdout);
  say_error("error: {}\n", message);
  return static_cast<int>(code);
}

/// What is wrong with an unknown verb or flag in `args`, with the nearest known one; "" when all are known.
std::string unknown_word(const CLI::App& app, const std::vector<std::string>& args) {
  auto message = [](const char* what, const std::string& got, const std::vector<std::string>& known) {
    const std::string nearest = nearest_name(got, known);
    return fmt::format("unknown {} '{}'.{}", what, got,
                       nearest.empty() ? "" : fmt::format(" Did you mean '{}'?", nearest));
  };
  if (args[0].empty() || args[0][0] == '-') return "";
  std::vector<std::string> known;
  for (const Verb& verb : kVerbs) known.push_back(verb.name);
  if (std::find(known.begin(), known.end(), args[0]) == known.end()) return message("command", args[0], known);
  const CLI::App* verb = app.get_subcommand(args[0]);
  if (!verb->get_subcommands([](const CLI::App*) { return true; }).empty()) return "";
  known.clear();
  for (const CLI::Option* option : verb->get_options()) {
    for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
  }
  for (const std::string& arg : args) {
    const std::string flag = arg.substr(0, arg.find('='));
    if (flag == "--") return "";  // what follows is no flag
    if (flag.rfind("--", 0) != 0 || std::find(known.begin(), known.end(), flag) != known.end()) continue;
    return message("flag", flag, known);
  }
  return "";
}

bool is_out_of_memory(const c10::Error& error) {
  return dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr ||
         std::string_view(error.what()).find("not enough memory: you tried to allocate") != std::string_view::npos ||
         std::string_view(error.what()).find("can't allocate memory") != std::string_view::npos;
}

/// Where the user keeps what programs may forget; "" when the environment doesn't say.
std::filesystem::path cache_folder() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && *cache == '/') return std::filesystem::path(cache) / "moesaic";
  const char* home = std::getenv("HOME");
  return home != nullptr && *home == '/' ? std::filesystem::path(home) / ".cache" / "moesaic" : "";
}

int run(int argc, char** argv) {
  CLI::App app{"Moesaic: train, evaluate and run mixtures of experts inside frozen pretrained language models",
               "moesaic"};
  app.set_version_flag("--version",
                       fmt::format("moesaic {} ({}, LibTorch {}, {})", kVersion, kCommit, TORCH_VERSION, __VERSION__));
  app.require_subcommand(1);
  std::list<CommonOptions> options;  // a list: addresses stay
  std::vector<std::pair<CLI::App*, std::pair<CommonOptions*, Runner>>> runners;
  for (const Verb& verb : kVerbs) {
    CLI::App* sub = app.add_subcommand(verb.name, verb.summary);
    CommonOptions& common = options.emplace_back();
    Runner runner = verb.add(*sub, common);
    add_common_options(*sub, common);
    runners.push_back({sub, {&common, std::move(runner)}});
  }

  const std::vector<std::string> args(argv + 1, argv + argc);
  if (args.empty()) {
    say(app.help());
    return static_cast<int>(ExitCode::kUsage);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {  // --help, --version
    const int code = app.exit(request);
    check_printed();
    return code;
  } catch (const CLI::ParseError& error) {
    const std::string verb = app.get_subcommands().empty() ? "" : app.get_subcommands()[0]->get_name() + " ";
    const std::string unknown = unknown_word(app, args);
    const std::string what = unknown.empty() ? std::string(error.what()) + "." : unknown;
    return fail(ExitCode::kUsage, fmt::format("{} See `moesaic {}--help`.", what, verb));
  }
  for (const auto& [sub, verb] : runners) {
    if (!sub->parsed()) continue;
    set_log_level(verb.first->log_level);
    set_threads(verb.first->threads);
    set_file_memory(cache_folder());
    const SpinWatch watch;
    choose_products();
    const int code = verb.second();
    if (code == static_cast<int>(ExitCode::kOk)) check_printed();
    return code;
  }
  return static_cast<int>(ExitCode::kUsage);
}

}  // namespace
}  // namespace moesaic::cli

int main(int argc, char** argv) {
  using moesaic::ExitCode;
  using moesaic::cli::fail;
  const moesaic::cli::ExitsAreMemory exits;
  moesaic::cli::open_closed_streams();
  moesaic::cli::obey_group_limit();
  moesaic::cli::let_writes_fail();
  moesaic::cli::bound_product_caches();
  try {
    return moesaic::cli::run(argc, argv);
  } catch (const moesaic::Error& error) {
    return fail(error.exit_code(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(ExitCode::kOutOfMemory, "out of memory. Try a smaller batch or a shorter cutoff.");
  } catch (const c10::Error& error) {
    if (moesaic::cli::is_out_of_memory(error)) {
      return fail(ExitCode::kOutOfMemory, fmt::format("out of memory: {}\nTry a smaller batch or a shorter cutoff.",
                                                      error.what_without_backtrace()));
    }
    return fail(ExitCode::kInternal, fmt::format("{}\nThis is a defect of moesaic, not of your input: please report it "
                                                 "with the command and the output of `moesaic doctor`.",
                                                 error.what()));
  } catch (const std::filesystem::filesystem_error& error) {
    return fail(ExitCode::kData, moesaic::message_of(error));
  } catch (const std::system_error& error) {  // no right to write, a file in a folder's place, a full disk
    const bool memory = error.code() == std::errc::not_enough_memory ||
                        error.code() == std::errc::resource_unavailable_try_again;  // no more threads, either
    if (memory) return fail(ExitCode::kOutOfMemory, fmt::format("out of memory or threads: {}", error.what()));
    return fail(ExitCode::kData, error.what());
  } catch (const std::exception& error) {
    return fail(ExitCode::kInternal,
                fmt::format("{}\nThis is a defect of moesaic: please report it with the command and "
                            "the output of `moesaic doctor`.",
                            error.what()));
  }
}
