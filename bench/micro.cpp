// Micro benchmarks of the parts that decide speed, at the sizes of SmolLM2-135M (d 576, f 1536, 9 heads, 3 KV heads of
// 64). Run: build/bench/moesaic_bench_micro --benchmark_filter=...; rates are FLOP/s of the base product or bytes/s of
// weights.
#include <benchmark/benchmark.h>

#include "moesaic/moe/low_rank.h"
#include "moesaic/moe/scale.h"
#include "moesaic/nn/attention.h"
#include "moesaic/nn/feed_forward.h"
#include "moesaic/nn/kernels.h"
#include "moesaic/nn/loss.h"
#include "moesaic/nn/norm.h"

namespace {

using namespace moesaic;

constexpr int64_t kRows = 2048, kHidden = 576, kFeedForward = 1536, kHeads = 9, kKvHeads = 3, kHeadDim = 64;
constexpr int64_t kVocabulary = 49152;

/// 8 sequences of 256 rows.
std::vector<int64_t> offsets() {
  std::vector<int64_t> result;
  for (int64_t row = 0; row <= kRows; row += 256) result.push_back(row);
  return result;
}

torch::Tensor leaf(at::IntArrayRef shape) { return torch::randn(shape).set_requires_grad(true); }

moe::Router router(int64_t experts, int64_t width) {
  moe::Router result;
  if (experts > 1) result.weight = torch::randn({experts, width}) * 0.02;
  return result;
}

/// q, k, v as one product, forward and backward, with E experts of rank r at each (E = 0: the frozen product alone).
void low_rank_group(benchmark::State& state) {
  const int64_t experts = state.range(0), rank = state.range(1);
  const std::vector<int64_t> outs{kHeads * kHeadDim, kKvHeads * kHeadDim, kKvHeads * kHeadDim};
  nn::LinearGroup group(kHidden, outs, /*bias=*/false, torch::kFloat32);
  {
    torch::NoGradGuard no_grad;
    for (const nn::Linear& member : group.members()) torch::Tensor(member->weight).normal_(0, 0.02);
  }
  for (int64_t index = 0; experts > 0 && index < 3; ++index) {
    auto added = std::make_shared<moe::LowRankExperts>();
    added->index = index;
    added->experts = experts;
    added->rank = rank;
    added->scale = 2.0;
    added->a = torch::randn({experts, rank, kHidden}) * 0.02;
    added->b = torch::randn({experts * rank, outs[index]}) * 0.02;
    added->router = router(experts, kHidden);
    moe::LowRankGroup::of(group)->add(added, /*trainable=*/true);
  }
  const torch::Tensor x = leaf({kRows, kHidden});
  const torch::Tensor gradient = torch::randn({kRows, outs[0] + outs[1] + outs[2]});
  nn::Pass pass;
  for (auto _ : state) group.forward(x, pass).backward(gradient);
  const double flop = 4.0 * kRows * kHidden * (outs[0] + outs[1] + outs[2]);
  state.counters["base FLOP/s"] = benchmark::Counter(flop, benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(low_rank_group)
    ->ArgNames({"E", "r"})
    ->Args({0, 0})
    ->Args({1, 4})
    ->Args({10, 4})
    ->Unit(benchmark::kMillisecond);

/// The FFN branch: silu(g) u without adapter (E = 0), or silu(g) m u with MoV (E = 1: (IA)^3), forward and backward.
void mov_branch(benchmark::State& state) {
  const int64_t experts = state.range(0);
  const torch::Tensor gate_up = leaf({kRows, 2 * kFeedForward});
  const torch::Tensor gradient = torch::randn({kRows, kFeedForward});
  moe::ScaleExperts scale(torch::ones({std::max<int64_t>(experts, 1), kFeedForward}).set_requires_grad(true),
                          router(experts, kFeedForward), /*effect=*/1.0);
  if (scale.router.defined()) scale.router.weight.set_requires_grad(true);
  nn::Pass pass;
  for (auto _ : state) {
    torch::Tensor y;
    if (experts == 0) {
      y = nn::gated_linear_unit(gate_up, nn::GluKind::kSilu);
    } else {
      const auto halves = gate_up.chunk(2, 1);
      y = scale.forward_ffn(torch::silu(halves[0]), halves[1], pass);
    }
    y.backward(gradient);
  }
}
BENCHMARK(mov_branch)->ArgName("E")->Arg(0)->Arg(1)->Arg(10)->Unit(benchmark::kMillisecond);

void rms_norm(benchmark::State& state) {
  const torch::Tensor x = leaf({kRows, kHidden}), weight = torch::ones({kHidden});
  const torch::Tensor gradient = torch::randn({kRows, kHidden});
  for (auto _ : state) nn::rms_norm(x, weight, 1e-5).backward(gradient);
}
BENCHMARK(rms_norm)->Unit(benchmark::kMicrosecond);

/// 8 causal sequences of 256, forward and backward.
void attention(benchmark::State& state) {
  const torch::Tensor q = leaf({kRows, kHeads, kHeadDim}), k = leaf({kRows, kKvHeads, kHeadDim});
  const torch::Tensor v = leaf({kRows, kKvHeads, kHeadDim});
  const torch::Tensor gradient = torch::randn({kRows, kHeads, kHeadDim});
  nn::AttentionOptions options;
  options.scale = 1.0 / std::sqrt(static_cast<double>(kHeadDim));
  options.window = state.range(0);
  const std::vector<int64_t> rows = offsets();
  for (auto _ : state) nn::ragged_attention(q, k, v, rows, options).backward(gradient);
}
BENCHMARK(attention)->ArgName("window")->Arg(0)->Arg(128)->Unit(benchmark::kMillisecond);

/// A few rows through weights that lie in memory, not in the cache: 64 matrices of 576 x 1536 in turn. alike: by
/// kernels that round a row alike whatever their number.
void gemv(benchmark::State& state) {
  torch::NoGradGuard no_grad;
  constexpr int64_t kMatrices = 64;
  const bool int8 = state.range(0) != 0;
  std::vector<torch::Tensor> weights;
  for (int64_t i = 0; i < kMatrices; ++i) {
    const torch::Tensor weight = torch::randn({kFeedForward, kHidden});
    weights.push_back(int8 ? (weight * 30).round().clamp(-127, 127).to(torch::kChar) : weight);
  }
  const torch::Tensor x = torch::randn({state.range(1), kHidden}), scales = torch::full({kFeedForward}, 0.01f);
  size_t next = 0;
  const nn::AlikeRows alike(state.range(2) != 0 ? nn::AlikeRows::Number::kFew : nn::AlikeRows::Number::kAny);
  for (auto _ : state) {
    const torch::Tensor& weight = weights[next++ % kMatrices];
    benchmark::DoNotOptimize(int8 ? nn::linear_rows_int8(x, weight, scales, {}) : nn::linear_rows(x, weight, {}));
  }
  state.SetBytesProcessed(state.iterations() * weights[0].nbytes());
}
BENCHMARK(gemv)
    ->ArgNames({"int8", "rows", "alike"})
    ->ArgsProduct({{0, 1}, {1, 4, 8, 16, 32, 64}, {0, 1}})
    ->Unit(benchmark::kMicrosecond);

/// The head with a frozen matrix: loss and the hidden states' gradient over all rows.
void cross_entropy(benchmark::State& state) {
  const torch::Tensor hidden = leaf({kRows, kHidden}), weight = torch::randn({kVocabulary, kHidden}) * 0.02;
  const torch::Tensor labels = torch::randint(kVocabulary, {kRows});
  const torch::Tensor weights = torch::full({kRows}, 1.0 / kRows);
  for (auto _ : state) nn::chunked_cross_entropy(hidden, weight, labels, weights, 0.0).backward();
  const double flop = 4.0 * kRows * kHidden * kVocabulary;
  state.counters["FLOP/s"] = benchmark::Counter(flop, benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(cross_entropy)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
