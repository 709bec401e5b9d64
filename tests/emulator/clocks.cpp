#include "clocks.h"

#include <algorithm>

#include "machine.h"

namespace emu {
namespace {

void raise(Epochs& into, const Epochs& from) {
    for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

}  // namespace

bool knows(const Thread& thread, Actor actor, uint32_t epoch) {
    const Knowledge& known = *thread.clock.known;
    if (actor.block == thread.block->number)
        return actor.slot == thread.index || known.own_block[actor.slot] >= epoch;
    const auto found = known.other_blocks.find(actor.block);
    return found != known.other_blocks.end() && (*found->second)[actor.slot] >= epoch;
}

void merge(Message& into, const Message& from) {
    for (const auto& [block, epochs] : from) {
        auto& mine = into[block];
        if (mine == epochs) continue;
        if (mine == nullptr) {
            mine = epochs;
            continue;
        }
        Epochs both = *mine;
        raise(both, *epochs);
        mine = std::make_shared<const Epochs>(std::move(both));
    }
}

void meet(const std::vector<Thread*>& threads) {
    auto all = std::make_shared<Knowledge>(*threads.front()->clock.known);
    std::vector<const Knowledge*> seen{threads.front()->clock.known.get()};
    for (const Thread* thread : threads) {
        const Knowledge* known = thread->clock.known.get();
        if (std::find(seen.begin(), seen.end(), known) != seen.end()) continue;
        seen.push_back(known);
        raise(all->own_block, known->own_block);
        merge(all->other_blocks, known->other_blocks);
    }
    for (const Thread* thread : threads) all->own_block[thread->index] = thread->clock.epoch;
    for (Thread* thread : threads) {
        thread->clock.known = all;
        ++thread->clock.epoch;
    }
}

Message publish(Thread& thread) {
    Epochs mine = thread.clock.known->own_block;
    mine[thread.index] = thread.clock.epoch++;
    Message message = thread.clock.known->other_blocks;
    message[thread.block->number] = std::make_shared<const Epochs>(std::move(mine));
    return message;
}

void absorb(Thread& thread, const Message& message) {
    if (message.empty()) return;
    auto known = std::make_shared<Knowledge>(*thread.clock.known);
    merge(known->other_blocks, message);
    const auto own = known->other_blocks.find(thread.block->number);
    if (own != known->other_blocks.end()) {
        raise(known->own_block, *own->second);
        known->other_blocks.erase(own);
    }
    thread.clock.known = std::move(known);
}

}  // namespace emu
