// The state of one launch: blocks, warps, threads, and who waits for what. Internal to the emulator.
#pragma once

#include <signal.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "emulator.h"
#include "fiber.h"
#include "shadow.h"

namespace emu {

// A place in the kernel: a return address, turned into file:line only when a message needs it.
using Site = const void*;
#define EMU_SITE __builtin_extract_return_addr(__builtin_return_address(0))

constexpr int kWarpSize = 32;
constexpr int kNumNamedBarriers = 16;
constexpr int kMaxMbarriers = 64;

struct Block;
struct Warp;

struct AsyncCopy {
    char* smem;
    const char* gmem;
    int bytes, bytes_read;
    bool done, is_bulk;
};

// What a wgmma that nobody has waited for yet will leave in its registers.
struct PendingSums {
    float* d;
    std::vector<float> sums;
    int group;
};

struct Thread {
    FiberContext context;
    Block* block = nullptr;
    Warp* warp = nullptr;
    int index = 0, lane = 0;
    uint3 thread_index{};
    bool is_done = false;
    const char* waits_at = nullptr;  // the instruction it waits in; null: it runs
    Site site = nullptr;
    std::vector<std::vector<AsyncCopy>> copy_groups;  // committed, oldest first
    std::vector<AsyncCopy> open_group;
    std::vector<PendingSums> pending_sums;
    int wgmma_groups = 0;         // committed so far
    const int* polled = nullptr;  // the last ld_acquire: the same value again is no progress
    int polled_value = 0;
    Clock clock;
};

// .sync instructions name their lanes, of which those that have exited are not waited for; .aligned ones need
// the whole warp at one place.
enum class CollectiveKind { kSync, kAligned };

// Threads on their way into one warp-wide operation.
struct Collective {
    const char* name;
    CollectiveKind kind;
    uint32_t mask, arrived;
    Site site;
    void (*execute)(const Collective& complete, const void* closure);
    const void* closure;        // on the stack of the first lane to arrive, as its operands are
    void* operands[kWarpSize];  // each lane's
};

struct Warp {
    std::vector<Thread*> lanes;
    std::vector<Collective> pending;
};

struct Barrier {
    int expected = 0;
    Site site = nullptr;
    std::vector<Thread*> waiting;
};

struct Mbarrier {
    int slot;  // in the block's epochs
    int arrivals_per_phase, pending_arrivals;
    int64_t pending_bytes = 0;
    uint32_t phase = 0;
    Message arriving, completed;
};

struct BulkCopy {
    AsyncCopy copy;
    Block* block;
    uint64_t* mbar;
};

// Dynamic shared memory or one static variable, between guard zones.
struct SharedPiece {
    std::unique_ptr<char[]> storage;
    size_t storage_bytes = 0;
    char* data = nullptr;
    size_t bytes = 0;
    std::unique_ptr<Shadow> shadow;
};

struct Block {
    int number = 0;  // linear
    uint3 index{};
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    int alive = 0;
    Barrier barriers[kNumNamedBarriers];
    bool barrier_predicate = false, barrier_result = false;
    std::unordered_map<uint64_t*, Mbarrier> mbarriers;

    std::vector<SharedPiece> shared;                 // the dynamic one first
    std::unordered_map<const void*, int> static_at;  // index in `shared`, by declaration
};

// Small and fast (splitmix64): a choice is made at every switch.
class Random {
  public:
    using result_type = uint64_t;
    explicit Random(uint64_t seed) : state_(seed) {}
    static constexpr uint64_t min() { return 0; }
    static constexpr uint64_t max() { return ~uint64_t{0}; }
    uint64_t operator()() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    size_t below(size_t bound) { return static_cast<size_t>(((*this)() >> 32) * bound >> 32); }

  private:
    uint64_t state_;
};

struct Machine {
    const Launch& launch;
    const LaunchOptions& options;
    Random random;
    bool is_depth_first;  // whoever was woken last goes on, as a rule; else all are drawn alike
    FiberContext host;
    std::vector<Block> resident;
    std::vector<int> waiting_blocks;  // not started yet, next one last
    std::vector<Thread*> ready;
    std::vector<BulkCopy> bulk_copies;
    std::unordered_map<const void*, Message> published;    // by address of the flag
    std::unordered_map<uintptr_t, Shadow> buffer_shadows;  // by start of the buffer
    int unfinished_copies = 0;                             // cp.async ones
    uint64_t idle_switches = 0;                            // since anything moved
    Thread* running = nullptr;
    std::string error;

    Machine(const Launch& l, const LaunchOptions& o)
        : launch(l), options(o), random(o.seed), is_depth_first(o.seed % 2 == 1) {}
    int threads_per_block() const {
        return static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    }
};

extern Machine* machine;  // of the launch in progress; null outside

Thread& self();

// Stops the launch with a message that starts with the running thread and the place.
[[noreturn]] void fail(Site site, const std::string& what);

// The running thread waits in `what` until wake(); others go on.
void wait_in(const char* what, Site site);
void wake(Thread& thread);
// Others may go on now; the thread stays ready. Without progress() in between, this is what a spin loop does.
void yield(const char* what, Site site);
void progress();

std::string describe(const Thread& thread);

// Where `site` is, as file:line of the kernel, and whether two sites are the same line.
std::string where(Site site);
bool is_same_place(Site a, Site b);

// While it lives, a SIGSEGV of a kernel is an Error.
class FaultHandler {
  public:
    FaultHandler();
    ~FaultHandler();

  private:
    stack_t stack_before_;
};

// The running thread has exited: the rest of its warp no longer waits for it.
void leave_warp();

// Asynchronous copies, as the scheduler sees them.
void complete_some_copy();      // one at random, if the launch completes copies at random
bool complete_one_bulk_copy();  // false: there is none
void drop_copies_of(Block& block);

// Bytes of a bulk copy have come.
void bytes_arrived(Block& block, uint64_t* mbar, int bytes);

// Shared memory of a block.
void create_shared(Block& block, size_t bytes);
void check_guard_zones(const Block& block);
Shadow* shared_shadow(Block& block, const void* address);

std::string name_of(const void* address);  // "shared+64 (of 128 bytes)", "y+12 (of 128 bytes)"
// The operand of an instruction must lie in this block's shared memory, aligned.
void check_shared(const void* address, size_t bytes, size_t alignment, const char* what, Site site);
void check_aligned(const void* address, size_t alignment, const char* what, Site site);

// An access by the running thread, from an instruction or from a hook of the checker: in bounds, initialised,
// and ordered after what it conflicts with. Does nothing in a launch without the checker.
enum class AccessKind { kRead, kWrite, kAtomicRead, kAtomicWrite };
void check_access(const void* address, size_t bytes, AccessKind kind, Site site);
// Reads that may come from a stale cache: nothing in this launch may write there.
void check_constant(const void* address, size_t bytes, Site site);

// Registered buffers.
struct RegisteredBuffer {
    size_t bytes;
    std::string name;
    Access access;
};
const std::pair<const uintptr_t, RegisteredBuffer>* buffer_at(const void* address);
bool any_buffer_registered();
void check_buffer_guards();

}  // namespace emu
