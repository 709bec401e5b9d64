// Which thread runs next, and what it means when none can.
#include <algorithm>
#include <mutex>
#include <numeric>
#include <sstream>
#include <tuple>

#include "machine.h"

namespace emu {

Machine* machine = nullptr;

namespace {

constexpr size_t kMaxResidentThreads = 16384;  // each stack is two memory maps, and a process may have 65530

// A launch that has switched this often per thread without anything moving will never move.
constexpr uint64_t kIdleRounds = 100;

void thread_entry() {
    fiber_entered();
    try {
        machine->launch.thread_main(machine->launch.context);
    } catch (const std::exception& e) {
        fail(nullptr, std::string("the kernel threw ") + e.what());
    }
    Thread& me = self();
    me.is_done = true;
    --me.block->alive;
    leave_warp();
    progress();
    switch_fiber(me.context, machine->host);  // the host thread sees who has ended, and never comes back here
    __builtin_unreachable();
}

void start_block(Block& block, int number, size_t first_slot) {
    const Launch& launch = machine->launch;
    const int num_threads = machine->threads_per_block();
    const unsigned n = static_cast<unsigned>(number);
    block.number = number;
    block.index = {n % launch.grid.x, n / launch.grid.x % launch.grid.y, n / launch.grid.x / launch.grid.y};
    block.alive = num_threads;
    block.threads = std::vector<Thread>(num_threads);
    block.warps = std::vector<Warp>((num_threads + kWarpSize - 1) / kWarpSize);
    create_shared(block, launch.smem_bytes);
    std::shared_ptr<const Knowledge> nothing;
    if (launch.checked)
        nothing = std::make_shared<Knowledge>(Knowledge{Epochs(num_threads + kMaxMbarriers, 0), {}});
    for (int t = 0; t < num_threads; ++t) {
        Thread& thread = block.threads[t];
        const unsigned u = static_cast<unsigned>(t), x = launch.block.x, y = launch.block.y;
        thread.block = &block;
        thread.warp = &block.warps[t / kWarpSize];
        thread.index = t;
        thread.lane = t % kWarpSize;
        thread.thread_index = {u % x, u / x % y, u / x / y};
        thread.clock.known = nothing;
        thread.warp->lanes.push_back(&thread);
        prepare_fiber(thread.context, first_slot + t, thread_entry);
        machine->ready.push_back(&thread);
    }
}

// Blocks with threads that wait, and where; equal ones together.
std::string waiting_threads() {
    std::map<std::tuple<int, std::string, Site>, int> counts;
    for (const Block& block : machine->resident)
        for (const Thread& thread : block.threads)
            if (!thread.is_done)
                ++counts[{block.number, thread.waits_at ? thread.waits_at : "running", thread.site}];
    std::ostringstream text;
    int listed = 0;
    for (const auto& [key, count] : counts) {
        if (++listed > 8) {
            text << "; ...";
            break;
        }
        const auto& [block, what, site] = key;
        text << (listed == 1 ? "" : "; ") << count << " threads of block " << block << " in " << what
             << " at " << where(site);
    }
    return text.str();
}

[[noreturn]] void fail_stuck(const char* kind) {
    std::ostringstream text;
    text << kind << ": " << waiting_threads();
    const size_t not_started = machine->waiting_blocks.size();
    if (not_started > 0)
        text << "; " << not_started << " blocks have not started (" << machine->resident.size()
             << " can be resident together)";
    machine->error = text.str();
    if (machine->running == nullptr) throw Error(machine->error);
    switch_fiber(self().context, machine->host);
    __builtin_unreachable();
}

// Takes the next thread off the ready list.
Thread* pick() {
    Machine& m = *machine;
    complete_some_copy();
    while (m.ready.empty())
        if (!complete_one_bulk_copy()) fail_stuck("deadlock");
    if (++m.idle_switches > 2 * m.ready.size() + 64 && complete_one_bulk_copy()) m.idle_switches = 0;
    if (m.idle_switches > kIdleRounds * (m.ready.size() + 64)) fail_stuck("livelock");
    const bool takes_last = m.is_depth_first && m.random() % 16 != 0;
    const size_t i = takes_last ? m.ready.size() - 1 : m.random.below(m.ready.size());
    Thread* next = m.ready[i];
    m.ready[i] = m.ready.back();
    m.ready.pop_back();
    return next;
}

void run_another() {
    Thread& me = self();
    Thread* next = pick();
    if (next == &me) return;
    machine->running = next;
    switch_fiber(me.context, next->context);
}

void check_launch(const Launch& launch, const LaunchOptions& options) {
    const auto count = [](dim3 d) { return uint64_t{d.x} * d.y * d.z; };
    const auto need = [](bool ok, const char* argument, uint64_t got, const char* needed) {
        if (!ok)
            throw Error(std::string("launch: ") + argument + ": got " + std::to_string(got) + ", need " +
                        needed);
    };
    need(count(launch.block) >= 1 && count(launch.block) <= 1024, "threads per block", count(launch.block),
         "1 to 1024");
    need(count(launch.grid) >= 1 && count(launch.grid) < (1u << 31), "blocks", count(launch.grid),
         "1 to 2^31 - 1");
    need(launch.smem_bytes <= 227 * 1024, "smem_bytes", launch.smem_bytes,
         "at most 232448, what any GPU has");
    need(options.resident_blocks >= 1, "resident_blocks", options.resident_blocks, "at least 1");
}

void run_all_blocks() {
    Machine& m = *machine;
    const size_t num_threads = m.threads_per_block();
    for (size_t b = 0; b < m.resident.size(); ++b) {
        start_block(m.resident[b], m.waiting_blocks.back(), b * num_threads);
        m.waiting_blocks.pop_back();
    }
    for (size_t running = m.resident.size(); running > 0;) {
        m.running = nullptr;
        m.running = pick();
        switch_fiber(m.host, m.running->context);
        if (!m.error.empty()) throw Error(m.error);
        Block& ended = *m.running->block;  // here because a thread has ended
        if (ended.alive > 0) continue;
        m.running = nullptr;
        check_guard_zones(ended);
        drop_copies_of(ended);
        if (m.waiting_blocks.empty()) {
            --running;
            continue;
        }
        const size_t slot = static_cast<size_t>(&ended - m.resident.data());
        ended = Block();
        start_block(ended, m.waiting_blocks.back(), slot * num_threads);
        m.waiting_blocks.pop_back();
    }
}

}  // namespace

Thread& self() {
    return *machine->running;
}

void progress() {
    machine->idle_switches = 0;
}

std::string describe(const Thread& thread) {
    const uint3 b = thread.block->index;
    std::ostringstream text;
    text << "block (" << b.x << ", " << b.y << ", " << b.z << ") thread " << thread.index;
    return text.str();
}

void fail(Site site, const std::string& what) {
    if (machine == nullptr || machine->running == nullptr) throw Error(what);
    machine->error = where(site) + ": " + what + " [" + describe(self()) + "]";
    switch_fiber(self().context, machine->host);
    __builtin_unreachable();
}

void wait_in(const char* what, Site site) {
    Thread& me = self();
    me.waits_at = what;
    me.site = site;
    run_another();
    me.waits_at = nullptr;
}

void wake(Thread& thread) {
    progress();
    machine->ready.push_back(&thread);
}

void yield(const char* what, Site site) {
    std::vector<Thread*>& ready = machine->ready;
    ready.push_back(&self());
    std::swap(ready.back(), ready[machine->random.below(ready.size())]);  // not the next to go on by rule
    wait_in(what, site);
}

void run(const Launch& launch, const LaunchOptions& options) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    check_launch(launch, options);
    Machine m(launch, options);
    const size_t num_blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    const size_t fit = kMaxResidentThreads / m.threads_per_block();
    m.resident.resize(std::min({num_blocks, static_cast<size_t>(options.resident_blocks), fit}));
    m.waiting_blocks.resize(num_blocks);
    std::iota(m.waiting_blocks.rbegin(), m.waiting_blocks.rend(), 0);
    if (options.shuffle_blocks) std::shuffle(m.waiting_blocks.begin(), m.waiting_blocks.end(), m.random);
    struct Current {
        explicit Current(Machine& now) { machine = &now; }
        ~Current() { machine = nullptr; }
    } current(m);
    const FaultHandler faults;
    run_all_blocks();
    check_buffer_guards();
}

}  // namespace emu
