// Runs a fuzz target without libFuzzer: <folder of seeds> <count>. First the seeds, then `count` inputs made of them by
// changes that are the same in every run. An input that ends the process is left in the file crash-<name of the
// folder>.
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

std::string input, crash_file;

void keep_input(int signal) {
  if (std::FILE* file = std::fopen(crash_file.c_str(), "wb")) {
    std::fwrite(input.data(), 1, input.size(), file);
    std::fclose(file);
  }
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void run() { LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size()); }

void change(std::string& text, std::mt19937_64& random) {
  const size_t at = text.empty() ? 0 : random() % text.size();
  const size_t length = std::min(text.size() - at, size_t{1} + random() % 16);
  switch (random() % 5) {
    case 0: text.insert(at, 1, static_cast<char>(random())); break;
    case 1: text.erase(at, length); break;
    case 2: text.insert(at, text.substr(at, length)); break;
    case 3:
      if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << random() % 8));
      break;
    default:
      if (!text.empty()) text[at] = "\x00\x7F\xFF\"{}[]:,09-e"[random() % 15];
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::filesystem::path folder = argv[1];
  crash_file = "crash-" + folder.filename().string();
  for (int signal : {SIGABRT, SIGSEGV, SIGILL, SIGTRAP, SIGFPE, SIGBUS}) std::signal(signal, keep_input);
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::vector<std::string> seeds;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    input = seeds.back();
    run();
  }
  if (seeds.empty()) {
    std::fprintf(stderr, "%s: no seeds\n", argv[1]);
    return 1;
  }
  std::mt19937_64 random(1);
  const int64_t count = std::atoll(argv[2]);
  for (int64_t i = 0; i < count; ++i) {
    input = seeds[random() % seeds.size()];
    for (uint64_t changes = 1 + random() % 4; changes > 0; --changes) change(input, random);
    run();
  }
  std::printf("%zu seeds and %lld changed inputs\n", seeds.size(), static_cast<long long>(count));
}
