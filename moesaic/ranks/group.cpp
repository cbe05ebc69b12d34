#include "moesaic/ranks/group.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <numeric>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "moesaic/base/check.h"
#include "moesaic/base/machine.h"

namespace moesaic::ranks {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kMeeting(60'000);  // until all ranks have started
constexpr milliseconds kAsking(2'000);    // who still answers
constexpr std::chrono::hours kPatience(24);

std::string one_line(std::string text) { return text.substr(0, text.find('\n')); }

/// The address of this machine by which it reaches `host`: names of machines often mean 127.0.1.1.
std::string own_address(const std::string& host) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_DGRAM;
  MOESAIC_CHECK(getaddrinfo(host.c_str(), "9", &hints, &found) == 0, UsageError,
                "MASTER_ADDR: got '{}', expected the name or address of a machine", host);
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> holder(found, &freeaddrinfo);
  for (const addrinfo* each = found; each != nullptr; each = each->ai_next) {
    const int socket_ = socket(each->ai_family, SOCK_DGRAM, 0);
    if (socket_ < 0) continue;
    sockaddr_storage own{};
    socklen_t size = sizeof own;
    char text[NI_MAXHOST] = {};
    const bool known =
        connect(socket_, each->ai_addr, each->ai_addrlen) == 0 &&
        getsockname(socket_, reinterpret_cast<sockaddr*>(&own), &size) == 0 &&
        getnameinfo(reinterpret_cast<sockaddr*>(&own), size, text, sizeof text, nullptr, 0, NI_NUMERICHOST) == 0;
    close(socket_);
    if (known) return text;
  }
  return "127.0.0.1";
}

/// A socket that listens at 127.0.0.1, where a store's own would at every interface; port 0 becomes the one it got.
int listen_on_loopback(uint16_t& port) {
  const int listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  const int again = 1;
  const bool bound = listening >= 0 && setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &again, sizeof again) == 0 &&
                     bind(listening, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
                     listen(listening, SOMAXCONN) == 0 &&
                     getsockname(listening, reinterpret_cast<sockaddr*>(&address), &size) == 0;
  MOESAIC_CHECK(bound, DataError, "can't listen at 127.0.0.1:{}: {}", port, std::strerror(errno));
  port = ntohs(address.sin_port);
  return listening;
}

}  // namespace

struct Group::Links {
  c10::intrusive_ptr<c10d::Store> all;    // of all starts
  c10::intrusive_ptr<c10d::Store> store;  // of this start
  c10::intrusive_ptr<c10d::ProcessGroupGloo> group;
  milliseconds timeout{};
};

Group::Group() = default;
Group::~Group() = default;

Group::Group(const Place& place, std::chrono::seconds timeout) : rank_(place.rank), size_(place.size) {
  if (size_ == 1) return;
  outlive_closed_pipes();
  links_ = std::make_unique<Links>();
  // The group counts in nanoseconds: at most a hundred years.
  links_->timeout = std::min<std::chrono::seconds>(timeout, std::chrono::hours(24 * 36500));
  const std::string where = fmt::format("{}:{}", place.host, place.port);
  try {
    c10d::TCPStoreOptions options;
    options.port = static_cast<uint16_t>(place.port);
    options.isServer = first() && !place.hosted;
    options.waitWorkers = false;
    options.timeout = kMeeting;
    if (options.isServer && place.local_size == size_) options.masterListenFd = listen_on_loopback(options.port);
    links_->all = c10::make_intrusive<c10d::TCPStore>(place.host, options);
    // What an earlier start left there is not this one's.
    links_->store = c10::make_intrusive<c10d::PrefixStore>(fmt::format("moesaic/{}", place.restart), links_->all);
    const auto gloo = c10d::ProcessGroupGloo::Options::create(kMeeting);
    if (const char* interface = std::getenv("GLOO_SOCKET_IFNAME")) {
      gloo->devices = {c10d::ProcessGroupGloo::createDeviceForInterface(interface)};
    } else {
      const std::string address = own_address(place.host);
      const bool loopback = address.starts_with("127.") || address == "::1";
      MOESAIC_CHECK(!loopback || place.local_size == size_, UsageError,
                    "MASTER_ADDR: '{}' is {} on this machine, which the ranks of other machines can't reach, expected "
                    "an address of its network\nhint: give the address instead of the name, or the network's interface "
                    "as GLOO_SOCKET_IFNAME",
                    place.host, address);
      gloo->devices = {c10d::ProcessGroupGloo::createDeviceForHostname(address)};
    }
    links_->group = c10::make_intrusive<c10d::ProcessGroupGloo>(links_->store, static_cast<int>(rank_),
                                                                static_cast<int>(size_), gloo);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Lost(
        fmt::format("rank {} of {}: the ranks did not meet at {}: {}", rank_, size_, where, one_line(error.what())));
  }
}

void Group::begin() {
  if (size_ > 1 && first()) done([&] { links_->all->set("moesaic/begun", std::vector<uint8_t>{1}); });
}

bool Group::begun() { return size_ > 1 && any(first() && links_->all->check({"moesaic/begun"})); }

void Group::meet() {
  if (size_ == 1) return;
  torch::Tensor all = torch::empty({size_});
  all_gather(all, torch::zeros({1}), kPatience);
}

/// Makes `call`; where it fails, says which ranks are to blame: those that do not say that it failed for them, too.
void Group::done(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    std::vector<int64_t> silent;
    try {
      links_->store->setTimeout(kAsking);
      links_->store->set(fmt::format("failed/{}", rank_), std::vector<uint8_t>{1});
      const auto until = std::chrono::steady_clock::now() + kAsking;
      do {
        std::this_thread::sleep_for(milliseconds(100));
        silent.clear();
        for (int64_t other = 0; other < size_; ++other) {
          if (!links_->store->check({fmt::format("failed/{}", other)})) silent.push_back(other);
        }
      } while (!silent.empty() && std::chrono::steady_clock::now() < until);
    } catch (const std::exception&) {
      throw Lost(fmt::format("rank {} of {}: the other ranks are gone, and who keeps their store: {}", rank_, size_,
                             one_line(error.what())));
    }
    throw Lost(fmt::format("rank {} of {}: {}: {}", rank_, size_,
                           silent.empty() ? "the connection to the other ranks broke"
                                          : fmt::format("rank {} is gone or does not answer", fmt::join(silent, ", ")),
                           one_line(error.what())));
  }
}

std::vector<std::string> Group::gather(const std::string& own) {
  if (size_ == 1) return {own};
  torch::Tensor length = torch::tensor({static_cast<int64_t>(own.size())}),
                lengths = torch::empty({size_}, torch::kInt64);
  all_gather(lengths, length);
  const int64_t longest = lengths.max().item<int64_t>();
  torch::Tensor text = torch::zeros({std::max<int64_t>(1, longest)}, torch::kUInt8);
  torch::Tensor texts = torch::empty({size_ * text.numel()}, torch::kUInt8);
  if (!own.empty()) std::memcpy(text.data_ptr(), own.data(), own.size());
  all_gather(texts, text);
  std::vector<std::string> all;
  for (int64_t rank = 0; rank < size_; ++rank) {
    all.emplace_back(static_cast<const char*>(texts.data_ptr()) + rank * text.numel(), lengths[rank].item<int64_t>());
  }
  return all;
}

bool Group::any(bool own) {
  if (size_ == 1) return own;
  const std::vector<std::string> all = gather(own ? "1" : "0");
  return std::find(all.begin(), all.end(), "1") != all.end();
}

void Group::all_to_all(torch::Tensor& received, const std::vector<int64_t>& received_counts, const torch::Tensor& sent,
                       const std::vector<int64_t>& sent_counts) {
  torch::Tensor from = sent;
  std::vector<int64_t> in = received_counts, out = sent_counts;
  done([&] {
    c10d::AllToAllOptions options;
    options.timeout = links_->timeout;
    links_->group->alltoall_base(received, from, in, out, options)->wait();
  });
}

void Group::all_gather(torch::Tensor& all, const torch::Tensor& own) { all_gather(all, own, links_->timeout); }

void Group::all_gather(torch::Tensor& all, const torch::Tensor& own, milliseconds timeout) {
  torch::Tensor from = own;
  done([&] {
    c10d::AllgatherOptions options;
    options.timeout = timeout;
    links_->group->_allgather_base(all, from, options)->wait();
  });
}

struct Host::Store {
  c10::intrusive_ptr<c10d::TCPStore> store;
};

Host::Host() : store_(std::make_unique<Store>()) {
  c10d::TCPStoreOptions options;
  options.port = 0;
  options.masterListenFd = listen_on_loopback(options.port);
  options.isServer = true;
  options.waitWorkers = false;
  store_->store = c10::make_intrusive<c10d::TCPStore>("127.0.0.1", options);
}

Host::~Host() = default;

int64_t Host::port() const { return store_->store->getPort(); }

}  // namespace moesaic::ranks
