#include "cli/interrupt.h"

namespace moesaic::cli {
namespace {

// What a handler may touch.
volatile std::sig_atomic_t g_caught = 0;
volatile std::sig_atomic_t g_once = 0;

void on_signal(int caught) {
  g_caught = 1;
  // A second wish of a person ends the program. A terminal that goes away, or a batch system, may say it again.
  if (!g_once || (caught != SIGINT && caught != SIGTERM)) return;
  for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, SIG_DFL);
}

}  // namespace

CatchSignals::CatchSignals(std::initializer_list<int> signals, bool once) {
  g_caught = 0;
  g_once = once ? 1 : 0;
  struct sigaction action{};
  action.sa_handler = on_signal;
  if (once) action.sa_flags = SA_RESTART;  // what is written while saving is written whole
  for (const int signal : signals) {
    struct sigaction before{};
    sigaction(signal, nullptr, &before);
    if (signal == SIGHUP && before.sa_handler == SIG_IGN) continue;  // nohup
    sigaction(signal, &action, nullptr);
    before_.emplace_back(signal, before);
  }
}

CatchSignals::~CatchSignals() {
  for (const auto& [signal, action] : before_) sigaction(signal, &action, nullptr);
}

bool CatchSignals::caught() const { return g_caught != 0; }

}  // namespace moesaic::cli
