// From a return address to the line of the kernel, by addr2line; only when a message needs it.
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>
#include <sstream>
#include <unordered_map>

#include "machine.h"

namespace emu {
namespace {

// Where an instruction is wrapped, not where it is used.
bool is_wrapper(const std::string& file) {
    for (const char* name : {"ptx.cuh", "ptx_wgmma.cuh", "cuda_vocabulary.h", "emulator.h", "cuda_fp16.h",
                             "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp", "vector_functions.hpp"})
        if (file == name) return true;
    return false;
}

std::string look_up(Site site) {
    Dl_info object;
    link_map* map = nullptr;
    void* const found = const_cast<void*>(site);
    if (dladdr1(found, &object, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0) return "?";
    char path[4096];
    const char* file = map->l_name;
    if (file == nullptr || *file == 0) file = realpath("/proc/self/exe", path);
    // The address after a call may belong to the next line.
    const uintptr_t offset = reinterpret_cast<uintptr_t>(site) - map->l_addr - 1;
    std::ostringstream command;
    command << "addr2line -i -e '" << file << "' 0x" << std::hex << offset << " 2>/dev/null";
    std::string place;
    if (FILE* output = popen(command.str().c_str(), "r")) {
        char line[4096];
        while (fgets(line, sizeof line, output) != nullptr) {  // the innermost inlined function first
            const char* slash = std::strrchr(line, '/');
            std::string name = slash ? slash + 1 : line;
            name = name.substr(0, name.find_first_of(" \n"));
            if (place.empty() && !is_wrapper(name.substr(0, name.find(':')))) place = name;
        }
        pclose(output);
    }
    if (!place.empty() && place.front() != '?') return place;
    std::ostringstream raw;
    raw << file << "+0x" << std::hex << offset;
    return raw.str();
}

}  // namespace

std::string where(Site site) {
    if (site == nullptr) return "?";
    static std::unordered_map<Site, std::string> known;
    const auto found = known.find(site);
    if (found != known.end()) return found->second;
    return known[site] = look_up(site);
}

// The compiler may have copied the line into two branches.
bool is_same_place(Site a, Site b) {
    return a == b || where(a) == where(b);
}

}  // namespace emu
