#include "moesaic/serve/service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>

#include "moesaic/base/check.h"
#include "moesaic/serve/api_error.h"
#include "tests/generate/tiny_model.h"

namespace moesaic::serve {
namespace {

using std::chrono::steady_clock;

/// Keeps when and how its request ended.
struct Ended : generate::Listener {
  bool more(int64_t, generate::Piece piece) override {
    ++tokens;
    if (!piece.finish_reason.empty()) finish(200);
    return true;
  }
  void failed(std::exception_ptr error) override { finish(api_error_of(error).status); }
  void finish(int status) {
    if (order != nullptr) order->push_back(name);
    done.set_value(status);
  }
  int status() {
    auto future = done.get_future();
    return future.wait_for(std::chrono::seconds(20)) == std::future_status::ready ? future.get() : -1;
  }

  std::promise<int> done;
  std::string name;
  std::vector<std::string>* order = nullptr;
  int64_t tokens = 0;
};

class ServiceTest : public ::testing::Test {
 protected:
  Ask ask(const std::string& key, const std::shared_ptr<Ended>& listener, int64_t tokens = 4,
          double seconds = 60) const {
    return {{{{5, 6, 7}}, {.max_new_tokens = tokens}},
            {},
            listener,
            key,
            steady_clock::now() +
                std::chrono::duration_cast<steady_clock::duration>(std::chrono::duration<double>(seconds))};
  }
  /// Nothing is admitted until the future's promise is kept.
  std::thread hold(Service& service, std::shared_future<void> until) const {
    std::promise<void> held;
    std::thread holder([&service, until, &held] {
      service.between_steps([&](generate::Engine&) {
        held.set_value();
        until.wait();
      });
    });
    held.get_future().wait();
    return holder;
  }

  std::shared_ptr<models::CausalLM> model_ = testing::tiny_model();
  std::shared_ptr<tokenizer::Tokenizer> tokenizer_ = testing::word_tokenizer();
};

TEST_F(ServiceTest, AnswersAndComesToRest) {
  Service service(*model_, *tokenizer_, {});
  const auto ended = std::make_shared<Ended>();
  service.submit(ask("", ended));
  EXPECT_EQ(ended->status(), 200);
  EXPECT_EQ(ended->tokens, 4);
  EXPECT_EQ(service.drain(10), 0);
  EXPECT_EQ(service.load().running, 0);
  EXPECT_THROW(service.submit(ask("", ended)), ApiError);
}

TEST_F(ServiceTest, AKeyThatFloodsLeavesTheOthersTheirTurn) {
  Service service(*model_, *tokenizer_, {.engine = {.most_answers = 1}});
  std::promise<void> go;
  std::thread holder = hold(service, go.get_future().share());
  std::vector<std::string> order;
  std::vector<std::shared_ptr<Ended>> all;
  for (int i = 0; i < 60; ++i) {
    all.push_back(std::make_shared<Ended>());
    all.back()->name = i < 59 ? "flood" : "single";
    all.back()->order = &order;
    service.submit(ask(all.back()->name, all.back(), i < 59 ? 200 : 4));
  }
  go.set_value();
  holder.join();
  for (const auto& each : all) EXPECT_EQ(each->status(), 200);
  const auto place = std::find(order.begin(), order.end(), "single") - order.begin();
  EXPECT_LE(place, 4) << "a turn is worth 512 tokens: at most three of the flood's requests";
}

TEST_F(ServiceTest, AFullQueueSaysWhenToComeAgain) {
  Service service(*model_, *tokenizer_, {.max_queue = 3});
  std::promise<void> go;
  std::thread holder = hold(service, go.get_future().share());
  std::vector<std::shared_ptr<Ended>> all;
  for (int i = 0; i < 4; ++i) all.push_back(std::make_shared<Ended>());
  for (int i = 0; i < 3; ++i) service.submit(ask("", all[i]));
  try {
    service.submit(ask("", all[3]));
    ADD_FAILURE() << "expected a refusal";
  } catch (const ApiError& error) {
    EXPECT_EQ(error.status, 429);
    EXPECT_GE(error.retry_after, 1);
  }
  go.set_value();
  holder.join();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(all[i]->status(), 200);
}

TEST_F(ServiceTest, TimeEndsRequestsThatWaitAndThatRun) {
  Service service(*model_, *tokenizer_, {.queue_timeout = 0.2});
  std::promise<void> go;
  std::thread holder = hold(service, go.get_future().share());
  const auto late = std::make_shared<Ended>(), forgotten = std::make_shared<Ended>(),
             long_one = std::make_shared<Ended>();
  service.submit(ask("", late, 4, 0.05));
  service.submit(ask("", forgotten));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  go.set_value();
  holder.join();
  EXPECT_EQ(late->status(), 504);
  EXPECT_EQ(forgotten->status(), 503);
  service.submit(ask("", long_one, 1 << 20, 0.1));
  EXPECT_EQ(long_one->status(), 504);
  EXPECT_GT(long_one->tokens, 0);
  EXPECT_EQ(service.drain(10), 0);
}

TEST_F(ServiceTest, WhoIsCancelledHearsNothingMore) {
  Service service(*model_, *tokenizer_, {});
  const auto gone = std::make_shared<Ended>(), stays = std::make_shared<Ended>();
  service.cancel(service.submit(ask("", gone, 1 << 20)));
  service.submit(ask("", stays));
  EXPECT_EQ(stays->status(), 200);
  EXPECT_EQ(service.drain(10), 0);
  EXPECT_EQ(gone->done.get_future().wait_for(std::chrono::seconds(0)), std::future_status::timeout);
}

TEST_F(ServiceTest, DrainingCutsWhatDoesNotEnd) {
  Service service(*model_, *tokenizer_, {});
  const auto endless = std::make_shared<Ended>();
  service.submit(ask("", endless, 1 << 20));
  EXPECT_EQ(service.drain(0.2), 1);
  EXPECT_EQ(endless->status(), 503);
}

TEST_F(ServiceTest, WorkBetweenStepsThrowsWhereItWasAskedFor) {
  Service service(*model_, *tokenizer_, {});
  EXPECT_THROW(service.between_steps([](generate::Engine&) { throw UsageError("no"); }), UsageError);
  const auto ended = std::make_shared<Ended>();
  Ask unknown = ask("", ended);
  unknown.weights = {{"nobody", 1.0}};
  service.submit(unknown);
  EXPECT_EQ(ended->status(), 400);
}

}  // namespace
}  // namespace moesaic::serve
