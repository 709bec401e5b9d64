// What the checker remembers of a piece of memory: for every 4 bytes the accesses that a later one could race
// with.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "clocks.h"

namespace emu {

class Shadow {
  public:
    Shadow(const void* data, size_t bytes, bool is_initialised);

    // Empty if the access is ordered after all that it conflicts with, else what is wrong.
    std::string access(const Thread& thread, const void* address, size_t bytes, bool is_write, bool is_atomic,
                       const void* site);

    // Asynchronous writes. From start to finish no thread may touch the bytes; afterwards they count as
    // written by `actor` in `epoch`.
    std::string start_async_write(const Thread& thread, const void* address, size_t bytes, const void* site);
    void finish_async_write(const void* address, size_t bytes, Actor actor, uint32_t epoch);

  private:
    struct Entry {
        Actor actor;
        uint32_t epoch;
        uint8_t bytes;  // a mask of 4
        bool is_write, is_atomic, in_flight;
        const void* site;
    };
    struct Granule {
        uint8_t initialised = 0;  // a mask of 4
        std::vector<Entry> entries;
    };
    template <class Visit>
    void each_granule(const void* address, size_t bytes, Visit visit);
    static std::string conflict(const Thread& thread, const Granule& granule, const Entry& now);
    static void record(const Thread& thread, Granule& granule, const Entry& now);

    uintptr_t start_;
    std::vector<Granule> granules_;
};

}  // namespace emu
