// Asynchronous copies from global to shared memory, which may write at once, late, or at any moment in
// between.
#include <cstring>

#include "instructions.h"
#include "machine.h"

namespace emu {
namespace {

void complete(AsyncCopy& copy) {
    if (copy.done) return;
    std::memcpy(copy.smem, copy.gmem, copy.bytes_read);
    std::memset(copy.smem + copy.bytes_read, 0, copy.bytes - copy.bytes_read);
    copy.done = true;
    if (!copy.is_bulk) --machine->unfinished_copies;
}

bool is_done_at_issue() {
    switch (machine->options.completion) {
        case Completion::kEager:
            return true;
        case Completion::kLazy:
            return false;
        default:
            return machine->random() % 2 == 0;
    }
}

void check_source(const void* gmem, int bytes, int alignment, const char* name, Site site) {
    if (bytes == 0) return;
    check_aligned(gmem, alignment, name, site);
    check_access(gmem, bytes, AccessKind::kRead, site);
}

void start_write(const void* smem, int bytes, Site site) {
    if (!machine->launch.checked) return;
    const std::string problem =
        shared_shadow(*self().block, smem)->start_async_write(self(), smem, bytes, site);
    if (!problem.empty()) fail(site, problem + ", at " + name_of(smem));
}

void complete_bulk(size_t i) {
    BulkCopy bulk = machine->bulk_copies[i];
    machine->bulk_copies[i] = machine->bulk_copies.back();
    machine->bulk_copies.pop_back();
    complete(bulk.copy);
    bytes_arrived(*bulk.block, bulk.mbar, bulk.copy.bytes);
}

AsyncCopy* some_unfinished_copy(Thread& thread) {
    for (auto& group : thread.copy_groups)
        for (AsyncCopy& copy : group)
            if (!copy.done && machine->random() % 2 == 0) return &copy;
    return nullptr;
}

}  // namespace

void cp_async(void* smem, const void* gmem, int bytes, int bytes_read) {
    const Site site = EMU_SITE;
    check_shared(smem, bytes, bytes, "cp.async", site);
    check_source(gmem, bytes_read, bytes, "cp.async", site);
    start_write(smem, bytes, site);
    AsyncCopy copy{static_cast<char*>(smem), static_cast<const char*>(gmem), bytes, bytes_read, false, false};
    ++machine->unfinished_copies;
    if (is_done_at_issue()) complete(copy);
    self().open_group.push_back(copy);
}

void cp_async_commit() {
    Thread& me = self();
    me.copy_groups.emplace_back();
    me.copy_groups.back().swap(me.open_group);
}

void cp_async_wait(int allowed_pending) {
    Thread& me = self();
    while (static_cast<int>(me.copy_groups.size()) > allowed_pending) {
        for (AsyncCopy& copy : me.copy_groups.front()) {
            complete(copy);
            if (machine->launch.checked)
                shared_shadow(*me.block, copy.smem)
                    ->finish_async_write(copy.smem, copy.bytes, {me.block->number, me.index}, me.clock.epoch);
        }
        me.copy_groups.erase(me.copy_groups.begin());
    }
}

void bulk_copy_g2s(void* smem, const void* gmem, int bytes, uint64_t* mbar) {
    const Site site = EMU_SITE;
    if (bytes <= 0 || bytes % 16 != 0)
        fail(site, "cp.async.bulk: " + std::to_string(bytes) + " bytes, need a positive multiple of 16");
    check_shared(smem, bytes, 16, "cp.async.bulk", site);
    check_source(gmem, bytes, 16, "cp.async.bulk", site);
    const auto found = self().block->mbarriers.find(mbar);
    if (found == self().block->mbarriers.end())
        fail(site, "cp.async.bulk: " + name_of(mbar) + " was not initialised as an mbarrier");
    start_write(smem, bytes, site);
    if (machine->launch.checked)
        shared_shadow(*self().block, smem)
            ->finish_async_write(smem, bytes, {self().block->number, found->second.slot},
                                 found->second.phase + 1);
    const AsyncCopy copy{static_cast<char*>(smem), static_cast<const char*>(gmem), bytes, bytes, false, true};
    machine->bulk_copies.push_back({copy, self().block, mbar});
    if (is_done_at_issue()) complete_bulk(machine->bulk_copies.size() - 1);
}

void complete_some_copy() {
    Machine& m = *machine;
    if (m.options.completion != Completion::kRandom || (m.bulk_copies.empty() && m.unfinished_copies == 0))
        return;
    if (m.random() % 4 != 0) return;
    if (!m.bulk_copies.empty()) complete_bulk(m.random.below(m.bulk_copies.size()));
    Block& block = m.resident[m.random.below(m.resident.size())];
    if (block.threads.empty()) return;
    if (AsyncCopy* copy = some_unfinished_copy(block.threads[m.random.below(block.threads.size())]))
        complete(*copy);
}

bool complete_one_bulk_copy() {
    if (machine->bulk_copies.empty()) return false;
    complete_bulk(machine->random.below(machine->bulk_copies.size()));
    return true;
}

void drop_copies_of(Block& block) {
    for (Thread& thread : block.threads) {
        thread.copy_groups.push_back(std::move(thread.open_group));
        for (const auto& group : thread.copy_groups)
            for (const AsyncCopy& copy : group) machine->unfinished_copies -= copy.done ? 0 : 1;
    }
    for (const BulkCopy& bulk : machine->bulk_copies)
        if (bulk.block == &block)
            throw Error("block " + std::to_string(block.number) +
                        " ended with a bulk copy into its shared memory in flight");
}

}  // namespace emu
