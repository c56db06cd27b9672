// The fibers of a block and their scheduler.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace jam::emulation {

thread_local Place place{};

namespace {

enum class State { kReady, kAtBarrier, kInExchange, kLeft };

constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
  unsigned index;
  State state = State::kLeft;
  bool begun = false;
  unsigned mask = 0;   // of the exchange it waits for
  uint64_t given = 0;  // to it
  uint64_t received[32];
  ucontext_t context;
#ifndef JAM_EMULATION_UCONTEXT
  jmp_buf here;
#endif
  void* stack = nullptr;

  explicit Fiber(unsigned index) : index(index) {
    stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
  }
  ~Fiber() { munmap(stack, kStackBytes); }
  Fiber(const Fiber&) = delete;
};

// An OS thread's fibers; they stay for the next block.
class Scheduler {
 public:
  void run(unsigned num_threads, size_t bytes, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    num_threads_ = num_threads;
    while (fibers_.size() < num_threads) fibers_.push_back(std::make_unique<Fiber>(fibers_.size()));
    memory_.reset(new (std::align_val_t{16}) unsigned char[bytes]);
    std::memset(memory_.get(), 0xFF, bytes);
    ready_.clear();
    left_ = waiting_ = 0;
    for (unsigned i = 0; i < num_threads; ++i) make_ready(*fibers_[i]);
    while (!ready_.empty()) {
      std::swap(ready_[random() % ready_.size()], ready_.back());
      Fiber& next = *ready_.back();
      ready_.pop_back();
      resume(next);
      settle(next);
    }
    if (left_ < num_threads) fail();
  }

  unsigned char* memory() { return memory_.get(); }

  void wait(State state) {
    running_->state = state;
    yield();
  }

  const uint64_t* exchange(unsigned mask, uint64_t given) {
    if (!(mask >> lane() & 1)) throw std::runtime_error("a lane is not in its own mask");
    running_->mask = mask;
    running_->given = given;
    wait(State::kInExchange);
    return running_->received;
  }

  uint64_t random() {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return (state_ * 0x2545F4914F6CDD1Dull) >> 11;
  }
  void set_seed(uint64_t seed) { state_ = seed * 2 + 1; }

 private:
  struct Free {
    void operator()(unsigned char* memory) const {
      ::operator delete[](memory, std::align_val_t{16});
    }
  };

  const std::function<void()>* kernel_ = nullptr;
  unsigned num_threads_ = 0, left_ = 0, waiting_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_;
  std::unique_ptr<unsigned char, Free> memory_;
  Fiber* running_ = nullptr;
  uint64_t state_ = 1;
  ucontext_t main_;
#ifndef JAM_EMULATION_UCONTEXT
  jmp_buf here_;
#endif

  void make_ready(Fiber& fiber) {
    fiber.state = State::kReady;
    ready_.push_back(&fiber);
  }

  // What follows from where a fiber has stopped.
  void settle(Fiber& fiber) {
    switch (fiber.state) {
      case State::kReady:  // preempted
        ready_.push_back(&fiber);
        break;
      case State::kLeft:
        ++left_;
        break;
      case State::kAtBarrier:
        if (++waiting_ < num_threads_) break;
        waiting_ = 0;
        for (unsigned i = 0; i < num_threads_; ++i) make_ready(*fibers_[i]);
        break;
      case State::kInExchange:
        complete(fiber);
        break;
    }
  }

  // Completes an exchange when all lanes of its mask are in it.
  void complete(Fiber& fiber) {
    const unsigned first = fiber.index / 32 * 32;
    uint64_t all[32] = {};
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(fiber.mask >> lane & 1)) continue;
      if (first + lane >= num_threads_) return;
      const Fiber& other = *fibers_[first + lane];
      if (other.state != State::kInExchange || other.mask != fiber.mask) return;
      all[lane] = other.given;
    }
    const unsigned mask = fiber.mask;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Fiber& other = *fibers_[first + lane];
      std::memcpy(other.received, all, sizeof(all));
      make_ready(other);
    }
  }

  [[noreturn]] void fail() {
    unsigned in_exchange = 0;
    for (unsigned i = 0; i < num_threads_; ++i) {
      in_exchange += fibers_[i]->state == State::kInExchange;
      fibers_[i]->begun = false;  // its stack is given up
    }
    throw std::runtime_error("threads wait for ever: " + std::to_string(waiting_) +
                             " at a barrier, " + std::to_string(in_exchange) +
                             " in a warp's exchange, " + std::to_string(left_) + " have left");
  }

  void run_fiber() {
    for (;;) {
      (*kernel_)();
      wait(State::kLeft);
    }
  }

  static void entry();

  void begin(Fiber& fiber) {
    fiber.begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Scheduler::entry, 0);
  }

#ifdef JAM_EMULATION_UCONTEXT  // which sanitizers follow
  void resume(Fiber& fiber) {
    running_ = &fiber;
    place.thread.x = fiber.index;
    if (!fiber.begun) begin(fiber);
    swapcontext(&main_, &fiber.context);
  }
  void yield() { swapcontext(&running_->context, &main_); }
#else  // without a system call
  void resume(Fiber& fiber) {
    running_ = &fiber;
    place.thread.x = fiber.index;
    if (_setjmp(here_) != 0) return;
    if (fiber.begun) _longjmp(fiber.here, 1);
    begin(fiber);
    setcontext(&fiber.context);
  }
  void yield() {
    if (_setjmp(running_->here) == 0) _longjmp(here_, 1);
  }
#endif
};

thread_local Scheduler scheduler;

void Scheduler::entry() { scheduler.run_fiber(); }

}  // namespace

void launch(unsigned num_blocks, unsigned num_threads, size_t bytes,
            const std::function<void()>& kernel) {
  place.num_blocks.x = num_blocks;
  place.num_threads.x = num_threads;
  for (unsigned block = 0; block < num_blocks; ++block) {
    place.block.x = block;
    scheduler.run(num_threads, bytes, kernel);
  }
}

void set_seed(uint64_t seed) { scheduler.set_seed(seed); }
unsigned char* block_memory() { return scheduler.memory(); }
void wait_for_block() { scheduler.wait(State::kAtBarrier); }
const uint64_t* exchange(unsigned mask, uint64_t given) { return scheduler.exchange(mask, given); }

void may_preempt() {
  if (scheduler.random() % 4 == 0) scheduler.wait(State::kReady);
}

}  // namespace jam::emulation
