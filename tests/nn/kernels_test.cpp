#include "moesaic/nn/kernels.h"

#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "tests/nn/gradcheck.h"

namespace moesaic::nn {
namespace {

using test::relative_error;

// float32 sums of up to 600 products against float64: 1e-7 an operation, errors add like a random walk.
constexpr double kFloatTolerance = 2e-6;

/// Of the instruction sets that this processor has.
std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> found{&kGenericKernels};
  if (&kernels() == &kAvx512Kernels) found.push_back(&kAvx2Kernels);
  if (&kernels() != &kGenericKernels) found.push_back(&kernels());
  return found;
}

TEST(LinearRows, LiteralProduct) {
  const auto x = torch::tensor({{1.f, 2.f, 3.f}});
  const auto w = torch::tensor({{1.f, 0.f, -1.f}, {2.f, 2.f, 2.f}});
  // [1 - 3 + 10, 2 (1 + 2 + 3) - 1]
  EXPECT_TRUE(torch::equal(linear_rows(x, w, torch::tensor({10.f, -1.f})), torch::tensor({{8.f, 11.f}})));
}

TEST(LinearRows, EqualsDoubleForAnyShapeRowCountAndDtype) {
  torch::manual_seed(0);
  for (int64_t rows : {1, 2, 3, 4, 5, 9}) {
    for (auto [in, out] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {7, 5}, {8, 4}, {33, 1021}, {576, 130}}) {
      const auto x = torch::randn({rows, in}), w = torch::randn({out, in}), b = torch::randn({out});
      const auto expected = at::linear(x.to(torch::kFloat64), w.to(torch::kFloat64), b.to(torch::kFloat64));
      EXPECT_LT(relative_error(linear_rows(x, w, b), expected), kFloatTolerance) << rows << "x" << in << "x" << out;
      EXPECT_LT(relative_error(linear_rows(x, w, {}), expected - b), kFloatTolerance);
      const auto xh = x.to(torch::kBFloat16), wh = w.to(torch::kBFloat16), bh = b.to(torch::kBFloat16);
      const auto expected_half = at::linear(xh.to(torch::kFloat64), wh.to(torch::kFloat64), bh.to(torch::kFloat64));
      const auto half = linear_rows(xh, wh, bh);
      EXPECT_EQ(half.scalar_type(), torch::kBFloat16);
      EXPECT_LT(relative_error(half, expected_half), 1.0 / 128) << "bfloat16 has 8 bits: one rounding of the result";
    }
  }
}

/// Rows 0 .. n-1 of a product have the bits that each has alone.
void expect_alike(AlikeRows::Number number, const std::function<torch::Tensor(const torch::Tensor&)>& product,
                  const torch::Tensor& x) {
  const AlikeRows alike(number);
  std::vector<torch::Tensor> alone;
  for (int64_t n = 0; n < x.size(0); ++n) alone.push_back(product(x.narrow(0, n, 1)));
  for (int64_t rows : {2, 3, 4, 5, 7, 8, 12, 16, 17, 33, 48, 64, 100}) {
    for (int64_t first : {int64_t{0}, x.size(0) - rows}) {
      const torch::Tensor together = product(x.narrow(0, first, rows));
      for (int64_t n = 0; n < rows; ++n) {
        EXPECT_TRUE(torch::equal(together.narrow(0, n, 1), alone[first + n])) << rows << " rows, row " << n;
      }
    }
  }
}

/// Who multiplies, for one scope.
class UsedProducts {
 public:
  explicit UsedProducts(Products used) : before_(products()) { set_products(used); }
  ~UsedProducts() { set_products(before_); }

 private:
  Products before_;
};

TEST(LinearRows, EqualsDoubleWhoeverMultiplies) {
  torch::manual_seed(0);
  constexpr double kTolerance = 3e-6;  // as kFloatTolerance, for sums of up to 1500 products
  for (const Products used : {Products::kOwn, Products::kLibrary}) {
    const UsedProducts guard(used);
    for (const int64_t rows : {5, 13, 40, 530}) {
      for (auto [in, out] :
           std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {7, 5}, {300, 33}, {576, 192}, {64, 1500}}) {
        SCOPED_TRACE(fmt::format("{}: {} x {} x {}", used == Products::kOwn ? "own" : "library", rows, in, out));
        // Rows further apart than they are long.
        const auto x = torch::randn({rows, in + 3}).narrow(1, 2, in), w = torch::randn({out, in + 1}).narrow(1, 1, in);
        const auto b = torch::randn({out}), g = torch::randn({rows, out + 2}).narrow(1, 1, out);
        const auto xd = x.to(torch::kFloat64), wd = w.to(torch::kFloat64), gd = g.to(torch::kFloat64);
        const auto expected = at::linear(xd, wd, b.to(torch::kFloat64)), back = gd.mm(wd);
        EXPECT_LT(relative_error(linear_rows(x, w, b), expected), kTolerance);
        EXPECT_LT(relative_error(back_rows(g, w), back), kTolerance);
        const auto leaf = x.detach().clone().requires_grad_(true);
        const auto y = linear_rows(leaf, w, {});
        EXPECT_LT(relative_error(y.detach(), xd.mm(wd.t())), kTolerance);
        y.backward(g);
        EXPECT_LT(relative_error(leaf.grad(), back), kTolerance);
        auto wide = torch::zeros({rows, out + 2});
        auto target = wide.narrow(1, 1, out);
        linear_into(target, x, w, b);
        EXPECT_LT(relative_error(target, expected), kTolerance);
        EXPECT_EQ(wide.select(1, 0).abs().sum().item<float>() + wide.select(1, out + 1).abs().sum().item<float>(), 0)
            << "columns beside y changed";
      }
    }
  }
}

TEST(LinearRows, OwnProductsHaveTheSameBitsForAnyNumberOfRowsAndThreads) {
  torch::manual_seed(0);
  if (&kernels() == &kGenericKernels) GTEST_SKIP() << "this processor has no AVX2: the library multiplies";
  const UsedProducts guard(Products::kOwn);
  const int threads = at::get_num_threads();
  for (auto [in, out] : std::vector<std::pair<int64_t, int64_t>>{{576, 192}, {300, 700}, {33, 7}}) {
    const auto x = torch::randn({600, in}), w = torch::randn({out, in}), g = torch::randn({600, out});
    const auto all = linear_rows(x, w, {}), back = back_rows(g, w);
    for (const int used : {1, 2, 3, 7}) {
      at::set_num_threads(used);
      for (const int64_t rows : {5, 12, 17, 100, 511, 600}) {
        for (const int64_t first : {int64_t{0}, 600 - rows}) {
          SCOPED_TRACE(fmt::format("{} x {}, {} rows from {}, {} threads", in, out, rows, first, used));
          EXPECT_TRUE(torch::equal(linear_rows(x.narrow(0, first, rows), w, {}), all.narrow(0, first, rows)));
          EXPECT_TRUE(torch::equal(back_rows(g.narrow(0, first, rows), w), back.narrow(0, first, rows)));
        }
      }
    }
    at::set_num_threads(threads);
  }
}

TEST(AlikeRows, GiveARowTheSameBitsInAnyCompany) {
  torch::manual_seed(0);
  torch::NoGradGuard no_grad;
  using enum AlikeRows::Number;
  for (const Products used : {Products::kOwn, Products::kLibrary}) {
    const UsedProducts guard(used);
    for (auto [in, out] : std::vector<std::pair<int64_t, int64_t>>{{576, 192}, {1536, 61}, {33, 7}, {64, 1}}) {
      const auto x = torch::randn({110, in}), w = torch::randn({out, in}), b = torch::randn({out});
      const auto [q, scales] = quantize_rows_int8(w);
      for (const auto number : {kFew, kMany}) {
        const auto thin = w.narrow(0, 0, std::min<int64_t>(out, 40));
        const int64_t rank = std::min<int64_t>(in, 40);
        const auto a = torch::randn({rank, in});
        const std::map<std::string, std::function<torch::Tensor(const torch::Tensor&)>> products{
            {"linear_rows", [&](const torch::Tensor& rows) { return linear_rows(rows, w, b); }},
            {"int8",
             [&, &q = q, &scales = scales](const torch::Tensor& rows) { return linear_rows_int8(rows, q, scales, b); }},
            {"thin_dots", [&](const torch::Tensor& rows) { return thin_dots(rows, thin); }},
            {"thin_add", [&](const torch::Tensor& rows) {
               torch::Tensor y = rows.clone();
               thin_add(rows.narrow(1, 0, rank), a, 0.5, y);
               return y;
             }}};
        for (const auto& [name, product] : products) {
          SCOPED_TRACE(fmt::format("{} of {} x {}, {}", name, in, out, number == kFew ? "few" : "many"));
          expect_alike(number, product, x);
        }
      }
    }
  }
}

TEST(LinearRows, StaysDifferentiableForFewRows) {
  const auto x = torch::tensor({{1.f, 2.f}}).requires_grad_(true);
  const auto w = torch::tensor({{3.f, 4.f}, {5.f, 6.f}});
  linear_rows(x, w, {}).sum().backward();
  EXPECT_TRUE(torch::equal(x.grad(), torch::tensor({{8.f, 10.f}})));  // column sums of w
}

TEST(LinearRows, HalfPrecisionHasTheGradientOfTheProduct) {
  torch::manual_seed(0);
  constexpr double kRounding = 1.0 / 128;  // bfloat16 has 8 bits: one rounding of the result
  // 700 x 7,000 numbers: more than are converted at once.
  for (auto [rows, in, out] : std::vector<std::array<int64_t, 3>>{{9, 33, 21}, {5, 700, 7000}}) {
    const auto x = torch::randn({rows, in}).to(torch::kBFloat16), w = torch::randn({out, in}).to(torch::kBFloat16);
    const auto b = torch::randn({out}).to(torch::kBFloat16), g = torch::randn({rows, out}).to(torch::kBFloat16);
    const auto expected = at::mm(g.to(torch::kFloat64), w.to(torch::kFloat64));
    EXPECT_LT(relative_error(back_rows(g, w), expected), kRounding);
    const auto product = at::linear(x.to(torch::kFloat64), w.to(torch::kFloat64), b.to(torch::kFloat64));
    EXPECT_LT(relative_error(linear_rows(x, w, b), product), kRounding);
    for (const auto& bias : {b, torch::Tensor()}) {
      const auto leaf = x.clone().requires_grad_(true);
      const auto y = linear_rows(leaf, w, bias);
      EXPECT_LT(relative_error(y.detach(), bias.defined() ? product : product - b), kRounding);
      y.backward(g);
      EXPECT_LT(relative_error(leaf.grad(), expected), kRounding);
    }
  }
}

TEST(Thin, LiteralProducts) {
  const auto x = torch::tensor({{1.f, 2.f, 3.f}, {0.f, 1.f, 0.f}}), a = torch::tensor({{1.f, 0.f, 1.f}});
  const auto g = torch::tensor({{2.f}, {5.f}});
  EXPECT_TRUE(torch::equal(thin_dots(x, a), torch::tensor({{4.f}, {0.f}})));  // 1 + 3, 0
  auto y = x.clone();
  thin_add(g, a, 2.0, y);  // + 2 g a: 4 and 10 in the first and last column
  EXPECT_TRUE(torch::equal(y, torch::tensor({{5.f, 2.f, 7.f}, {10.f, 1.f, 10.f}})));
  auto dots = torch::empty({2, 1});
  EXPECT_TRUE(torch::equal(thin_outer(g, x, 3.0, a, dots), torch::tensor({{6.f, 27.f, 18.f}})));  // 3 (2 x0 + 5 x1)
  EXPECT_TRUE(torch::equal(dots, torch::tensor({{12.f}, {0.f}})));
}

TEST(Thin, EqualsDoubleForAnyShapeAndStride) {
  torch::manual_seed(7);
  for (int64_t rank : {1, 3, 4, 13, 16, 17}) {
    for (auto [rows, d] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {2, 8}, {35, 19}, {300, 70}}) {
      const auto wide = torch::randn({rows, d + 5}), thin = torch::randn({rows, rank + 2});
      const auto x = wide.narrow(1, 2, d), g = thin.narrow(1, 1, rank), a = torch::randn({rank, d});
      const auto xd = x.to(torch::kFloat64), gd = g.to(torch::kFloat64), ad = a.to(torch::kFloat64);
      const std::string what = fmt::format("rank {}, {}x{}", rank, rows, d);
      EXPECT_LT(relative_error(thin_dots(x, a), xd.mm(ad.t())), kFloatTolerance) << what;
      auto dots = torch::empty({rows, rank + 1}).narrow(1, 0, rank);
      EXPECT_LT(relative_error(thin_outer(g, x, -0.5, a, dots), -0.5 * gd.t().mm(xd)), kFloatTolerance) << what;
      EXPECT_LT(relative_error(dots, -0.5 * xd.mm(ad.t())), kFloatTolerance) << what;
      auto padded = wide.clone();
      auto y = padded.narrow(1, 2, d);
      thin_add(g, a, 2.0, y);
      EXPECT_LT(relative_error(y, xd + 2.0 * gd.mm(ad)), kFloatTolerance) << what;
      EXPECT_TRUE(torch::equal(padded.narrow(1, 0, 2), wide.narrow(1, 0, 2))) << "columns beside y changed";
      EXPECT_TRUE(torch::equal(padded.narrow(1, d + 2, 3), wide.narrow(1, d + 2, 3))) << "columns beside y changed";
    }
  }
}

TEST(LinearRowsInt8, EqualsTheDequantisedProduct) {
  torch::manual_seed(1);
  for (int64_t rows : {1, 2, 4, 5, 40, 61}) {
    for (auto [in, out] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {15, 3}, {16, 4}, {37, 1030}, {9000, 6}}) {
      const auto x = torch::randn({rows, in}), b = torch::randn({out});
      const auto [q, scales] = quantize_rows_int8(torch::randn({out, in}));
      const auto w = q.to(torch::kFloat64) * scales.to(torch::kFloat64).unsqueeze(1);
      const auto expected = at::linear(x.to(torch::kFloat64), w, b.to(torch::kFloat64));
      // Rounded to 16 bits of their own largest value: half a step is 1 / 65534. More than 16 rows with AVX512 have 8
      // bits of the largest of 32, some 2.5 times the usual: half a step is 1 / 100 of that, its mean square a third.
      const bool eight_bits = rows > 16 && &kernels() == &kAvx512Kernels;
      EXPECT_LT(relative_error(linear_rows_int8(x, q, scales, b), expected), eight_bits ? 1e-2 : 1e-4)
          << rows << "x" << in << "x" << out;
    }
  }
}

TEST(LinearRowsInt8, DoesNotOverflowOnTheLargestValues) {
  // Every product is 127 * 32767: 10,000 of them would pass 2^31 in a 32-bit lane.
  const int64_t in = 10'000;
  const auto [q, scales] = quantize_rows_int8(torch::ones({4, in}));
  EXPECT_LT(relative_error(linear_rows_int8(torch::ones({1, in}), q, scales, {}), torch::full({1, 4}, double(in))),
            1e-5);
}

TEST(LinearRowsInt8, RefusesGradients) {
  const auto [q, scales] = quantize_rows_int8(torch::ones({2, 3}));
  EXPECT_THROW(linear_rows_int8(torch::ones({1, 3}).requires_grad_(true), q, scales, {}), UsageError);
}

TEST(QuantizeRowsInt8, RoundsToTheNearestOf127StepsPerRow) {
  const auto [q, scales] = quantize_rows_int8(torch::tensor({{127.f, -63.6f, 0.4f}, {0.f, 0.f, 0.f}}));
  EXPECT_TRUE(torch::equal(q, torch::tensor({{127, -64, 0}, {0, 0, 0}}, torch::kInt8)));
  EXPECT_FLOAT_EQ(scales[0].item<float>(), 1.0f);
}

TEST(Kernels, AttendEqualsSoftmaxOnEveryInstructionSet) {
  torch::manual_seed(2);
  for (const KernelTable* table : tables()) {
    for (auto [length, k] : std::vector<std::pair<int64_t, int64_t>>{{1, 2}, {7, 10}, {8, 64}, {131, 20}}) {
      for (float softcap : {0.0f, 3.0f}) {
        const int64_t group = 3, stride = 2 * k;  // two KV heads, the second is read
        const auto q = torch::randn({group, k}), keys = torch::randn({length, 2, k}),
                   values = torch::randn({length, 2, k});
        const auto bias = torch::randn({group, length + 3});  // rows further apart than they are long
        const bool biased = length % 2 == 0;
        auto out = torch::empty({group, k}), scratch = torch::empty({group, length});
        table->attend(q.data_ptr<float>(), keys.data_ptr<float>() + k, values.data_ptr<float>() + k, stride, length,
                      group, k, 0.7f, softcap, biased ? bias.data_ptr<float>() : nullptr, bias.stride(0),
                      scratch.data_ptr<float>(), out.data_ptr<float>());
        auto scores = at::matmul(q.to(torch::kFloat64), keys.select(1, 1).to(torch::kFloat64).t()) * 0.7;
        if (softcap > 0) scores = at::tanh(scores / softcap) * softcap;
        if (biased) scores = scores + bias.slice(1, 0, length);
        const auto expected = at::matmul(at::softmax(scores, -1), values.select(1, 1).to(torch::kFloat64));
        EXPECT_LT(relative_error(out, expected), kFloatTolerance) << length << " keys of " << k;
      }
    }
  }
}

TEST(Kernels, Int8ProductsOfFewAndManyRowsAreOneToTheLastBit) {
  torch::manual_seed(1);
  for (const int64_t in : {7, 64, 512, 513, 1536}) {
    constexpr int64_t kOut = 37, kMost = 19;
    const auto w = torch::randint(-127, 128, {kOut, in}, torch::kInt8);
    const auto x = torch::randint(-32767, 32768, {kMost, in + in % 2}, torch::kInt16);
    if (in % 2 == 1) x.narrow(1, in, 1).zero_();
    const auto scales = torch::rand({kOut}), x_scales = torch::rand({kMost}), bias = torch::randn({kOut});
    torch::Tensor first;
    for (const KernelTable* table : tables()) {
      for (const int64_t rows : {1, 2, 3, 4, 6, 19}) {
        auto product = [&](auto function) {
          torch::Tensor y = torch::zeros({rows, kOut});
          function(x.data_ptr<int16_t>(), x.size(1), x_scales.data_ptr<float>(), rows, w.data_ptr<int8_t>(),
                   scales.data_ptr<float>(), bias.data_ptr<float>(), y.data_ptr<float>(), in, kOut, 0, kOut);
          return y;
        };
        const torch::Tensor few = product(table->gemv_int8);
        if (!first.defined()) first = product(table->gemm_int8);
        EXPECT_TRUE(torch::equal(few, product(table->gemm_int8))) << in << " wide, " << rows << " rows";
        EXPECT_TRUE(torch::equal(few[0], first[0]));
      }
    }
  }
}

TEST(Kernels, BlocksOf8BitsAreExactIntegersOnEveryInstructionSet) {
  torch::manual_seed(1);
  for (const int64_t in : {1, 31, 32, 130, 1536}) {
    constexpr int64_t kRows = 9, kOut = 70;
    const int64_t blocks = (in + kInt8Block - 1) / kInt8Block;
    const auto x = torch::randn({kRows, in}), bias = torch::randn({kOut}), scales = torch::rand({kOut});
    auto w = torch::randint(-127, 128, {kOut, in}, torch::kInt8);
    w.select(0, 0).fill_(127);  // with the largest activation: the most that a block can be
    for (const KernelTable* table : tables()) {
      auto q = torch::full({kRows, blocks * kInt8Block}, 99, torch::kInt8), x_scales = torch::empty({kRows, blocks});
      auto offsets = torch::empty({kRows, blocks}, torch::kInt32), y = torch::full({kRows, kOut}, 7.0f);
      table->quantize_blocks(x.data_ptr<float>(), q.data_ptr<int8_t>(), x_scales.data_ptr<float>(),
                             offsets.data_ptr<int32_t>(), in, 0, kRows);
      const auto split = q.to(torch::kFloat64).view({kRows, blocks, kInt8Block});
      EXPECT_EQ(q.narrow(1, in, q.size(1) - in).abs().sum().item<int64_t>(), 0) << "behind a row's end";
      EXPECT_TRUE(torch::equal(offsets.to(torch::kFloat64), split.sum(2) * -128));
      const auto read = (split * x_scales.to(torch::kFloat64).unsqueeze(2)).flatten(1).narrow(1, 0, in);
      EXPECT_LT((read - x).abs().div(x.abs().max()).max().item<double>(), 0.51 / 127);
      table->gemm_blocks(q.data_ptr<int8_t>(), x_scales.data_ptr<float>(), offsets.data_ptr<int32_t>(), kRows,
                         w.data_ptr<int8_t>(), scales.data_ptr<float>(), bias.data_ptr<float>(), y.data_ptr<float>(),
                         in, kOut, 0, kOut);
      const auto expected = read.mm(w.to(torch::kFloat64).t()) * scales + bias;
      EXPECT_LT(relative_error(y, expected), kFloatTolerance) << in << " wide";
    }
  }
}

TEST(Kernels, ExtremeScoresStayFinite) {
  for (const KernelTable* table : tables()) {
    const auto q = torch::tensor({{100.f, 0.f}}), keys = torch::tensor({{100.f, 0.f}, {-100.f, 0.f}});
    const auto values = torch::tensor({{1.f, 2.f}, {3.f, 4.f}});
    auto out = torch::empty({1, 2}), scratch = torch::empty({2});
    table->attend(q.data_ptr<float>(), keys.data_ptr<float>(), values.data_ptr<float>(), 2, 2, 1, 2, 1.0f, 0.0f,
                  nullptr, 0, scratch.data_ptr<float>(), out.data_ptr<float>());
    // Scores 10^4 and -10^4: the first key takes all; the other keeps e^-87, the least the kernel's exp returns.
    EXPECT_TRUE(at::allclose(out, torch::tensor({{1.f, 2.f}}), 1e-6));
  }
}

TEST(Kernels, InstructionSetsAgree) {
  torch::manual_seed(3);
  if (tables().size() == 1) GTEST_SKIP() << "this processor has no AVX2: there is one table";
  const int64_t rows = 3, f = 21;
  const auto x = torch::randn({rows, 2 * f}) * 4, dy = torch::randn({rows, f});
  for (GluKind kind : {GluKind::kSilu, GluKind::kGeluTanh}) {
    std::vector<torch::Tensor> values, slopes;
    for (const KernelTable* table : tables()) {
      values.push_back(torch::empty({rows, f}));
      slopes.push_back(torch::empty({rows, 2 * f}));
      table->glu(x.data_ptr<float>(), values.back().data_ptr<float>(), f, kind, 0, rows);
      table->glu_backward(dy.data_ptr<float>(), x.data_ptr<float>(), slopes.back().data_ptr<float>(), f, kind, 0, rows);
    }
    EXPECT_LT(relative_error(values[0], values[1]), kFloatTolerance);
    EXPECT_LT(relative_error(slopes[0], slopes[1]), kFloatTolerance);
  }
}

}  // namespace
}  // namespace moesaic::nn
