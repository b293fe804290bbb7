#include "fiber_block.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/tensor_core_fragments.h"
#include "kernels/reference/element_access.h"

namespace torch_ext::testing {
namespace {

constexpr std::size_t kStackBytes = 96 * 1024;
constexpr int kLanes = cuda::kWarpSize;

[[noreturn]] void fail(const char* what, std::int64_t detail) {
  std::fprintf(stderr, "fiber block: %s (%lld)\n", what, static_cast<long long>(detail));
  std::abort();
}

struct Copy {
  std::uint32_t target;
  const void* source;
  bool valid;
};

}  // namespace

struct FiberBlock::Fibers {
  enum class State { kReady, kAtBarrier, kFinished };
  struct Thread {
    ucontext_t context;
    jmp_buf place;
    State state = State::kReady;
    bool started = false;
    std::vector<std::vector<Copy>> groups{{}};  // of copies; the last one is open
  };
  struct Warp {
    void* slots[kLanes];
    const char* what = nullptr;
    int arrived = 0;
    std::int64_t generation = 0;
  };

  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::function<void()> body;
  jmp_buf scheduler;
  std::int64_t progress = 0;  // anything that lets a waiting thread go on

  static std::vector<std::unique_ptr<char[]>>& stacks() {
    static thread_local std::vector<std::unique_ptr<char[]>> pool;
    return pool;
  }
  static thread_local FiberBlock* starting;

  static void enter() {
    FiberBlock* block = starting;
    block->fibers_->body();
    Thread& own = block->fibers_->threads[static_cast<std::size_t>(block->current_)];
    own.state = State::kFinished;
    ++block->fibers_->progress;
    _longjmp(block->fibers_->scheduler, 1);
  }

  void resume(FiberBlock& block, int thread) {
    Thread& own = threads[static_cast<std::size_t>(thread)];
    block.current_ = thread;
    if (_setjmp(scheduler) != 0) return;
    if (own.started) _longjmp(own.place, 1);
    own.started = true;
    starting = &block;
    setcontext(&own.context);
  }

  void leave(int thread) {
    Thread& own = threads[static_cast<std::size_t>(thread)];
    if (_setjmp(own.place) == 0) _longjmp(scheduler, 1);
  }
};

thread_local FiberBlock* FiberBlock::Fibers::starting = nullptr;

FiberBlock::FiberBlock(std::int64_t index, int threads, int shared_bytes, bool backwards)
    : index_(index),
      backwards_(backwards),
      shared_(static_cast<std::size_t>(shared_bytes) / 8 + 2, ~std::uint64_t{0}),
      shared_bytes_(static_cast<std::size_t>(shared_bytes)),
      fibers_(std::make_unique<Fibers>()) {
  fibers_->threads = std::vector<Fibers::Thread>(static_cast<std::size_t>(threads));
  fibers_->warps = std::vector<Fibers::Warp>(static_cast<std::size_t>(threads / kLanes));
}

FiberBlock::~FiberBlock() = default;

void FiberBlock::run(const std::function<void()>& body) {
  Fibers& fibers = *fibers_;
  fibers.body = body;
  const int threads = static_cast<int>(fibers.threads.size());
  auto& stacks = Fibers::stacks();
  while (stacks.size() < fibers.threads.size()) {
    stacks.push_back(std::make_unique<char[]>(kStackBytes));
  }
  for (int i = 0; i < threads; ++i) {
    ucontext_t& context = fibers.threads[static_cast<std::size_t>(i)].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[static_cast<std::size_t>(i)].get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Fibers::enter, 0);
  }
  const int warps = threads / kLanes;
  for (;;) {
    for (int turn = 0; turn < warps; ++turn) {
      const int warp = backwards_ ? warps - 1 - turn : turn;
      for (bool waiting = true; waiting;) {
        waiting = false;
        const std::int64_t before = fibers.progress;
        for (int lane = 0; lane < kLanes; ++lane) {
          const int thread = warp * kLanes + lane;
          Fibers::Thread& own = fibers.threads[static_cast<std::size_t>(thread)];
          if (own.state == Fibers::State::kReady) fibers.resume(*this, thread);
          waiting |= own.state == Fibers::State::kReady;
        }
        if (waiting && fibers.progress == before) {
          fail("lanes of a warp wait for others that do not come", warp);
        }
      }
    }
    int finished = 0;
    for (Fibers::Thread& thread : fibers.threads) {
      if (thread.state == Fibers::State::kFinished) ++finished;
      if (thread.state == Fibers::State::kAtBarrier) thread.state = Fibers::State::kReady;
    }
    if (finished == threads) break;
    if (finished > 0) fail("a barrier that finished threads never reach", finished);
  }
  for (Fibers::Thread& thread : fibers.threads) {
    for (const auto& group : thread.groups) {
      if (!group.empty()) fail("copies nobody waited for", static_cast<std::int64_t>(group.size()));
    }
  }
}

void FiberBlock::sync() {
  Fibers::Thread& own = fibers_->threads[static_cast<std::size_t>(current_)];
  own.state = Fibers::State::kAtBarrier;
  ++fibers_->progress;
  fibers_->leave(current_);
}

void FiberBlock::together(const char* what, void* slot, WarpAction action) {
  const int thread = current_;
  Fibers::Warp& warp = fibers_->warps[static_cast<std::size_t>(thread / kLanes)];
  if (warp.arrived > 0 && std::strcmp(warp.what, what) != 0) {
    fail("lanes of a warp at different instructions", thread);
  }
  warp.what = what;
  warp.slots[thread % kLanes] = slot;
  const std::int64_t generation = warp.generation;
  if (++warp.arrived == kLanes) {
    action(warp.slots);
    warp.arrived = 0;
    ++warp.generation;
    ++fibers_->progress;
    return;
  }
  while (warp.generation == generation) fibers_->leave(thread);
}

bool FiberBlock::any(bool value) {
  together("any", &value, [](void* const* slots) {
    bool joined = false;
    for (int i = 0; i < kLanes; ++i) joined |= *static_cast<bool*>(slots[i]);
    for (int i = 0; i < kLanes; ++i) *static_cast<bool*>(slots[i]) = joined;
  });
  return value;
}

char* FiberBlock::shared_place(std::uint32_t offset, std::size_t size, std::size_t alignment) {
  if (offset + size > shared_bytes_) fail("outside shared memory", offset);
  if (offset % alignment != 0) fail("misaligned in shared memory", offset);
  return reinterpret_cast<char*>(shared_.data()) + offset;
}

namespace {

/// left x right, added to the accumulators `d` of each lane's Slot.
template <typename Slot, int kDepth>
void add_product(const float (&left)[16][kDepth], const float (&right)[kDepth][8],
                 void* const* slots) {
  float product[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int col = 0; col < 8; ++col) product[row][col] += left[row][k] * right[k][col];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<Slot*>(slots[lane]);
    for (int e = 0; e < 4; ++e) {
      const cuda::FragmentPlace at = cuda::accumulator_place(lane, e);
      own.d[e] += product[at.row][at.col];
    }
  }
}

}  // namespace

void FiberBlock::multiply_fragments(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1, const float* decode) {
  struct Slot {
    float* d;
    const std::uint32_t* a;
    std::uint32_t b[2];
    const float* decode;
  } slot{d, a, {b0, b1}, decode};
  together("multiply", &slot, [](void* const* slots) {
    float left[16][16];
    float right[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto& own = *static_cast<Slot*>(slots[lane]);
      for (int v = 0; v < 8; ++v) {
        const cuda::FragmentPlace at = cuda::left_place(lane, v);
        left[at.row][at.col] = own.decode[own.a[v / 2] >> (v % 2 * 16) & 0xFFFF];
      }
      for (int v = 0; v < 4; ++v) {
        const cuda::FragmentPlace at = cuda::right_place(lane, v);
        right[at.row][at.col] = own.decode[own.b[v / 2] >> (v % 2 * 16) & 0xFFFF];
      }
    }
    add_product<Slot>(left, right, slots);
  });
}

namespace {

/// A float's bits to the nearest TF32, ties away from zero, as cvt.rna.tf32 does.
float rounded_to_tf32(std::uint32_t bits) {
  constexpr std::uint32_t kInfinity = 0x7F800000u;
  if ((bits & ~0x80000000u) <= kInfinity) bits = (bits + 0x1000u) & ~0x1FFFu;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

}  // namespace

void FiberBlock::multiply_tf32_fragments(float (&d)[4], const std::uint32_t (&a)[4],
                                         std::uint32_t b0, std::uint32_t b1) {
  struct Slot {
    float* d;
    const std::uint32_t* a;
    std::uint32_t b[2];
  } slot{d, a, {b0, b1}};
  together("multiply_tf32", &slot, [](void* const* slots) {
    float left[16][8];
    float right[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto& own = *static_cast<Slot*>(slots[lane]);
      for (int v = 0; v < 4; ++v) {
        const cuda::FragmentPlace at = cuda::tf32_left_place(lane, v);
        left[at.row][at.col] = rounded_to_tf32(own.a[v]);
      }
      for (int v = 0; v < 2; ++v) {
        const cuda::FragmentPlace at = cuda::tf32_right_place(lane, v);
        right[at.row][at.col] = rounded_to_tf32(own.b[v]);
      }
    }
    add_product<Slot>(left, right, slots);
  });
}

void FiberBlock::load_fragments(std::uint32_t (&r)[4], std::uint32_t row, bool transposed) {
  struct Slot {
    const std::uint16_t* row;
    std::uint32_t* r;
    bool transposed;
  } slot{reinterpret_cast<const std::uint16_t*>(shared_place(row, 16, 16)), r, transposed};
  together(transposed ? "load_matrices_transposed" : "load_matrices", &slot,
           [](void* const* slots) {
             for (int lane = 0; lane < kLanes; ++lane) {
               auto& own = *static_cast<Slot*>(slots[lane]);
               for (int matrix = 0; matrix < 4; ++matrix) {
                 const auto element = [&](int of_row, int col) -> std::uint32_t {
                   return static_cast<Slot*>(slots[matrix * 8 + of_row])->row[col];
                 };
                 const int g = lane / 4;
                 const int t = lane % 4 * 2;
                 own.r[matrix] = own.transposed ? element(t, g) | element(t + 1, g) << 16
                                                : element(g, t) | element(g, t + 1) << 16;
               }
             }
           });
}

void FiberBlock::copy_async(std::uint32_t target, const void* source, bool valid) {
  char* place = shared_place(target, 16, 16);
  if (reinterpret_cast<std::uintptr_t>(source) % 16 != 0) fail("misaligned source", target);
  std::memset(place, 0xFF, 16);
  fibers_->threads[static_cast<std::size_t>(current_)].groups.back().push_back(
      {target, source, valid});
}

void FiberBlock::commit_copies() {
  fibers_->threads[static_cast<std::size_t>(current_)].groups.emplace_back();
}

void FiberBlock::land_copies(int newest) {
  auto& groups = fibers_->threads[static_cast<std::size_t>(current_)].groups;
  // The hardware's wait for none under way takes the open group too.
  const std::size_t kept = newest == 0 ? 0 : static_cast<std::size_t>(newest) + 1;
  while (groups.size() > kept) {
    for (const Copy& copy : groups.front()) {
      char* place = shared_place(copy.target, 16, 16);
      if (copy.valid) {
        std::memcpy(place, copy.source, 16);
      } else {
        std::memset(place, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
  if (groups.empty()) groups.emplace_back();
}

namespace {

std::vector<float> decoded(reference::HalfFormat format) {
  std::vector<float> table(1 << 16);
  for (std::size_t bits = 0; bits < table.size(); ++bits) {
    table[bits] =
        static_cast<float>(reference::decode_half(static_cast<std::uint16_t>(bits), format));
  }
  return table;
}

std::uint32_t packed(float low, float high, reference::HalfFormat format) {
  return reference::encode_half(low, format) |
         static_cast<std::uint32_t>(reference::encode_half(high, format)) << 16;
}

}  // namespace

const float* FiberBlock::decode_table(cuda::Bf16) {
  static const std::vector<float> table = decoded(reference::kBFloat16Format);
  return table.data();
}

const float* FiberBlock::decode_table(cuda::Fp16) {
  static const std::vector<float> table = decoded(reference::kFloat16Format);
  return table.data();
}

std::uint32_t FiberBlock::pack(cuda::Bf16, float low, float high) const {
  return packed(low, high, reference::kBFloat16Format);
}

std::uint32_t FiberBlock::pack(cuda::Fp16, float low, float high) const {
  return packed(low, high, reference::kFloat16Format);
}

}  // namespace torch_ext::testing
