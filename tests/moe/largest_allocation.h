// Measures the largest single CPU allocation made while it lives.
#pragma once
#include <c10/core/CPUAllocator.h>

#include <atomic>

namespace moesaic::moe {

class LargestAllocation : public c10::Allocator {
 public:
  LargestAllocation() : previous_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(this, 255); }
  ~LargestAllocation() override { c10::SetCPUAllocator(previous_, 255); }

  size_t bytes() const { return largest_; }

  c10::DataPtr allocate(size_t n) override {
    size_t seen = largest_;
    while (n > seen && !largest_.compare_exchange_weak(seen, n)) {
    }
    return previous_->allocate(n);
  }
  c10::DeleterFnPtr raw_deleter() const override { return previous_->raw_deleter(); }
  void copy_data(void* destination, const void* source, size_t count) const override {
    previous_->copy_data(destination, source, count);
  }

 private:
  c10::Allocator* previous_;
  std::atomic<size_t> largest_{0};
};

}  // namespace moesaic::moe
