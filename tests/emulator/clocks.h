// Who knows of whose writes: vector clocks over the threads of the resident blocks. Only the checker keeps
// them.
//
// Each thread counts the times it let others see its work (its epochs). Knowledge holds, for every thread,
// the last epoch of it that is known; an access is ordered before mine if I know its epoch. Threads that met
// at a barrier share one Knowledge, so a barrier costs one copy and not one per thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace emu {

struct Thread;

using Epochs = std::vector<uint32_t>;  // by slot: the threads of a block, then its mbarriers
using Message = std::map<int, std::shared_ptr<const Epochs>>;  // by block; what a release tells an acquire

struct Knowledge {
    Epochs own_block;
    Message other_blocks;
};

struct Clock {
    std::shared_ptr<const Knowledge> known;
    uint32_t epoch = 1;       // of this thread's accesses from now on
    Message fenced;           // what the last fence lets later relaxed writes publish
    Message pending_acquire;  // what relaxed reads saw, known after the next fence
};

// The accessor of an entry in a shadow: a slot of a block.
struct Actor {
    int block;
    int slot;
};

bool knows(const Thread& thread, Actor actor, uint32_t epoch);

// All of them have met: each knows what any of them knew and did.
void meet(const std::vector<Thread*>& threads);

// What `thread` knows and did, to be published; its later accesses are a new epoch.
Message publish(Thread& thread);
void merge(Message& into, const Message& from);
void absorb(Thread& thread, const Message& message);

}  // namespace emu
