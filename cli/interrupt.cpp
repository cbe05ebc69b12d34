#include "cli/interrupt.h"

namespace moesaic::cli {
namespace {

// What a handler may touch.
volatile std::sig_atomic_t g_caught = 0;
volatile std::sig_atomic_t g_once = 0;
sigset_t g_signals;

void on_signal(int) {
  g_caught = 1;
  if (!g_once) return;
  for (const int signal : {SIGINT, SIGTERM}) {
    if (sigismember(&g_signals, signal) == 1) std::signal(signal, SIG_DFL);
  }
}

}  // namespace

CatchSignals::CatchSignals(std::initializer_list<int> signals, bool once) {
  g_caught = 0;
  g_once = once ? 1 : 0;
  sigemptyset(&g_signals);
  for (const int signal : signals) sigaddset(&g_signals, signal);
  struct sigaction action{};
  action.sa_handler = on_signal;
  if (once) action.sa_flags = SA_RESTART;  // what is written while saving is written whole
  for (const int signal : signals) {
    struct sigaction before{};
    sigaction(signal, &action, &before);
    before_.emplace_back(signal, before);
  }
}

CatchSignals::~CatchSignals() {
  for (const auto& [signal, action] : before_) sigaction(signal, &action, nullptr);
}

bool CatchSignals::caught() const { return g_caught != 0; }

}  // namespace moesaic::cli
