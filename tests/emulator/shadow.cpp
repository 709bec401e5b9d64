#include "shadow.h"

#include <algorithm>
#include <sstream>

#include "machine.h"

namespace emu {
namespace {

constexpr uint8_t kWholeGranule = 15;

}  // namespace

Shadow::Shadow(const void* data, size_t bytes, bool is_initialised)
    : start_(reinterpret_cast<uintptr_t>(data) & ~uintptr_t{3}),
      granules_((reinterpret_cast<uintptr_t>(data) + bytes - start_ + 3) / 4) {
    if (is_initialised)
        for (Granule& granule : granules_) granule.initialised = kWholeGranule;
}

template <class Visit>
void Shadow::each_granule(const void* address, size_t bytes, Visit visit) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address) - start_, end = begin + bytes;
    for (uintptr_t g = begin / 4; g < (end + 3) / 4; ++g) {
        const uintptr_t from = std::max(begin, g * 4) - g * 4, to = std::min(end, g * 4 + 4) - g * 4;
        if (!visit(granules_[g], static_cast<uint8_t>((1u << to) - (1u << from)))) return;
    }
}

std::string Shadow::conflict(const Thread& thread, const Granule& granule, const Entry& now) {
    for (const Entry& before : granule.entries) {
        if ((before.bytes & now.bytes) == 0) continue;
        if (before.in_flight)
            return std::string(now.is_write ? "write to" : "read of") +
                   " bytes of a cp.async that is in flight, issued at " + where(before.site);
        if (!before.is_write && !now.is_write) continue;
        if ((before.is_atomic && now.is_atomic) || knows(thread, before.actor, before.epoch)) continue;
        std::ostringstream text;
        text << "race: " << (now.is_write ? "write" : "read") << ", not ordered after the "
             << (before.is_write ? "write" : "read") << " at " << where(before.site) << " by ";
        const int num_threads = machine->threads_per_block();
        if (before.actor.block != now.actor.block) text << "block " << before.actor.block << ' ';
        if (before.actor.slot < num_threads)
            text << "thread " << before.actor.slot;
        else
            text << "a bulk copy whose mbarrier this thread has not waited for";
        return text.str();
    }
    if (!now.is_write && (granule.initialised & now.bytes) != now.bytes)
        return "read of uninitialised memory";
    return {};
}

// What `now` makes needless goes: whoever races with the older one races with `now` too.
void Shadow::record(const Thread& thread, Granule& granule, const Entry& now) {
    for (Entry& before : granule.entries) {
        const bool is_mine = before.actor.block == now.actor.block && before.actor.slot == now.actor.slot;
        const bool is_covered = now.is_write ? is_mine || !(now.is_atomic && before.is_atomic)
                                             : !before.is_write && knows(thread, before.actor, before.epoch);
        if (is_covered) before.bytes &= static_cast<uint8_t>(~now.bytes);
    }
    auto& entries = granule.entries;
    entries.erase(std::remove_if(entries.begin(), entries.end(), [](const Entry& e) { return e.bytes == 0; }),
                  entries.end());
    entries.push_back(now);
    if (now.is_write) granule.initialised |= now.bytes;
}

std::string Shadow::access(const Thread& thread, const void* address, size_t bytes, bool is_write,
                           bool is_atomic, const void* site) {
    std::string problem;
    each_granule(address, bytes, [&](Granule& granule, uint8_t mask) {
        const Actor me{thread.block->number, thread.index};
        const Entry now{me, thread.clock.epoch, mask, is_write, is_atomic, false, site};
        problem = conflict(thread, granule, now);
        if (problem.empty()) record(thread, granule, now);
        return problem.empty();
    });
    return problem;
}

std::string Shadow::start_async_write(const Thread& thread, const void* address, size_t bytes,
                                      const void* site) {
    std::string problem;
    each_granule(address, bytes, [&](Granule& granule, uint8_t mask) {
        const Actor me{thread.block->number, thread.index};
        const Entry now{me, thread.clock.epoch, mask, true, false, true, site};
        problem = conflict(thread, granule, now);
        if (problem.empty()) record(thread, granule, now);
        return problem.empty();
    });
    return problem;
}

void Shadow::finish_async_write(const void* address, size_t bytes, Actor actor, uint32_t epoch) {
    each_granule(address, bytes, [&](Granule& granule, uint8_t mask) {
        for (Entry& entry : granule.entries)
            if (entry.in_flight && (entry.bytes & mask) != 0)
                entry = Entry{actor, epoch, entry.bytes, true, false, false, entry.site};
        return true;
    });
}

}  // namespace emu
