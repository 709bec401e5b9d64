// Barriers of a block: __syncthreads, named barriers, mbarriers.
#include <algorithm>

#include "instructions.h"
#include "machine.h"

namespace emu {
namespace {

// bar.sync on barrier `id`. Threads of a warp must come from one place; for __syncthreads, all threads of the
// block.
void arrive(int id, int expected, const char* name, Site site) {
    Thread& me = self();
    Block& block = *me.block;
    Barrier& barrier = block.barriers[id];
    if (id == 0 && block.alive < expected)
        fail(site, std::string(name) + ": " + std::to_string(expected - block.alive) +
                       " threads of the block have exited and cannot arrive");
    if (barrier.waiting.empty()) {
        barrier.expected = expected;
        barrier.site = site;
    }
    if (barrier.expected != expected)
        fail(site, std::string(name) + " expects " + std::to_string(expected) + " threads, but " +
                       where(barrier.site) + " expects " + std::to_string(barrier.expected) +
                       " at the same barrier");
    for (const Thread* other : barrier.waiting) {
        if (id != 0 && other->warp != me.warp) continue;
        if (!is_same_place(other->site, site))
            fail(site, std::string("divergent ") + name + ": this thread is here, another one of its " +
                           (id == 0 ? "block" : "warp") + " is at " + where(other->site));
        break;  // the others were compared with this one
    }
    barrier.waiting.push_back(&me);
    if (static_cast<int>(barrier.waiting.size()) < expected) {
        wait_in(name, site);
        return;
    }
    me.site = site;
    std::vector<Thread*> met;
    met.swap(barrier.waiting);
    if (machine->launch.checked) meet(met);
    if (id == 0) {
        block.barrier_result = block.barrier_predicate;
        block.barrier_predicate = false;
    }
    progress();
    for (Thread* thread : met)
        if (thread != &me) wake(*thread);
}

Mbarrier& mbarrier_at(uint64_t* mbar, const char* name, Site site) {
    check_shared(mbar, 8, 8, name, site);
    const auto found = self().block->mbarriers.find(mbar);
    if (found == self().block->mbarriers.end())
        fail(site, std::string(name) + ": " + name_of(mbar) + " was not initialised as an mbarrier");
    return found->second;
}

void end_phase_if_complete(Mbarrier& bar) {
    if (bar.pending_arrivals > 0 || bar.pending_bytes != 0) return;
    progress();
    ++bar.phase;
    bar.pending_arrivals = bar.arrivals_per_phase;
    bar.completed.swap(bar.arriving);
    bar.arriving.clear();
}

void arrive_at(uint64_t* mbar, int bytes, const char* name, Site site) {
    Mbarrier& bar = mbarrier_at(mbar, name, site);
    if (bar.pending_arrivals == 0)
        fail(site, std::string(name) + ": more than the " + std::to_string(bar.arrivals_per_phase) +
                       " arrivals of this phase");
    if (machine->launch.checked) merge(bar.arriving, publish(self()));
    bar.pending_bytes += bytes;
    --bar.pending_arrivals;
    progress();
    end_phase_if_complete(bar);
}

}  // namespace

void syncthreads() {
    arrive(0, machine->threads_per_block(), "__syncthreads", EMU_SITE);
}

int syncthreads_or(int predicate) {
    Block& block = *self().block;
    block.barrier_predicate |= predicate != 0;
    arrive(0, machine->threads_per_block(), "__syncthreads_or", EMU_SITE);
    return block.barrier_result;
}

void bar_sync(int id, int threads) {
    const Site site = EMU_SITE;
    if (id < 1 || id >= kNumNamedBarriers)
        fail(site, "bar.sync: barrier " + std::to_string(id) + ", need 1 to 15");
    if (threads < kWarpSize || threads % kWarpSize != 0 || threads > machine->threads_per_block())
        fail(site, "bar.sync: " + std::to_string(threads) +
                       " threads, need a multiple of 32 within the block's " +
                       std::to_string(machine->threads_per_block()));
    arrive(id, threads, "bar.sync", site);
}

void mbarrier_init(uint64_t* mbar, int arrivals) {
    const Site site = EMU_SITE;
    check_shared(mbar, 8, 8, "mbarrier.init", site);
    check_access(mbar, 8, AccessKind::kWrite, site);
    Block& block = *self().block;
    if (arrivals < 1) fail(site, "mbarrier.init: " + std::to_string(arrivals) + " arrivals, need at least 1");
    if (block.mbarriers.size() == kMaxMbarriers)
        fail(site, "mbarrier.init: more than 64 mbarriers in a block");
    const int slot = machine->threads_per_block() + static_cast<int>(block.mbarriers.size());
    if (!block.mbarriers.emplace(mbar, Mbarrier{slot, arrivals, arrivals, 0, 0, {}, {}}).second)
        fail(site, "mbarrier.init: " + name_of(mbar) + " is an mbarrier already");
}

void mbarrier_arrive(uint64_t* mbar) {
    arrive_at(mbar, 0, "mbarrier.arrive", EMU_SITE);
}

void mbarrier_arrive_expect_tx(uint64_t* mbar, int bytes) {
    arrive_at(mbar, bytes, "mbarrier.arrive.expect_tx", EMU_SITE);
}

bool mbarrier_try_wait_parity(uint64_t* mbar, int parity) {
    const Site site = EMU_SITE;
    const Mbarrier* bar = &mbarrier_at(mbar, "mbarrier.try_wait", site);
    if (static_cast<int>(bar->phase & 1) == (parity & 1)) {
        yield("mbarrier.try_wait", site);
        return false;
    }
    if (machine->launch.checked) absorb(self(), bar->completed);
    return true;
}

void bytes_arrived(Block& block, uint64_t* mbar, int bytes) {
    Mbarrier& bar = block.mbarriers.at(mbar);
    bar.pending_bytes -= bytes;
    if (machine->launch.checked) {  // the copy is its own actor, known to those who wait for this phase
        Epochs epochs(machine->threads_per_block() + kMaxMbarriers, 0);
        epochs[bar.slot] = bar.phase + 1;
        merge(bar.arriving, {{block.number, std::make_shared<const Epochs>(std::move(epochs))}});
    }
    progress();
    end_phase_if_complete(bar);
}

// The scheduler runs one thread at a time and copies wait for their issue: nothing is left to order.
void fence_mbarrier_init() {}
void fence_proxy_async() {}

}  // namespace emu
