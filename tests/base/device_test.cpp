#include "moesaic/base/device.h"

#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"

namespace moesaic {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

TEST(ParseDevice, KnowsItsNames) {
  EXPECT_TRUE(parse_device("cpu").is_cpu());
  EXPECT_EQ(parse_device("auto").is_cuda(), load_cuda());
  EXPECT_THAT([] { parse_device("gpu"); }, ThrowsMessage<UsageError>(HasSubstr("expected auto, cpu, cuda")));
  EXPECT_THROW(parse_device("cuda:"), UsageError);
  EXPECT_THROW(parse_device("cuda:-1"), UsageError);
  EXPECT_THROW(parse_device("cuda:1x"), UsageError);
  EXPECT_THROW(parse_device("cuda:99999"), UsageError);
}

TEST(ParseDevice, CudaIsAnErrorWithoutAGpuAndADeviceWithOne) {
  if (load_cuda()) {
    EXPECT_EQ(parse_device("cuda:0"), c10::Device(c10::kCUDA, 0));
  } else {
    EXPECT_THAT([] { parse_device("cuda"); }, ThrowsMessage<UsageError>(HasSubstr("no usable GPU")));
  }
}

TEST(NumberFormat, AutoAsksTheHardwareAndSaysWhy) {
  EXPECT_EQ(number_format("float32", c10::kCPU).dtype, c10::kFloat);
  EXPECT_EQ(number_format("bf16", c10::kCPU).dtype, c10::kBFloat16);
  EXPECT_EQ(number_format("auto", c10::kCPU).dtype, cpu_has_fast_bfloat16() ? c10::kBFloat16 : c10::kFloat);
  EXPECT_EQ(number_format("auto", c10::Device(c10::kCUDA, 0)).dtype, c10::kBFloat16);
  EXPECT_THAT([] { number_format("int8", c10::kCPU); }, ThrowsMessage<UsageError>(HasSubstr("expected auto, float32")));
  EXPECT_EQ(number_format("auto", c10::kCPU).reason,
            cpu_has_fast_bfloat16() ? "this CPU multiplies it faster than float32" : "this CPU has no fast bfloat16");
  EXPECT_EQ(dtype_name(c10::kBFloat16), "bfloat16");
}

TEST(SetThreads, SetsOrKeeps) {
  int before = at::get_num_threads();
  set_threads(0);
  EXPECT_EQ(at::get_num_threads(), before);
  set_threads(1);
  EXPECT_EQ(at::get_num_threads(), 1);
  set_threads(before);
  EXPECT_THROW(set_threads(-1), UsageError);
}

}  // namespace
}  // namespace moesaic
