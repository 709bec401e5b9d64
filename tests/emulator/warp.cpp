// What the threads of a warp do together: it happens when the last lane arrives.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda_vocabulary.h"
#include "instructions.h"
#include "machine.h"
#include "matrix.h"

namespace emu {
namespace {

uint32_t lanes_alive(const Warp& warp) {
    uint32_t alive = 0;
    for (const Thread* thread : warp.lanes) alive |= thread->is_done ? 0u : 1u << thread->lane;
    return alive;
}

using Kind = CollectiveKind;

Collective* pending(const char* name, Kind kind, uint32_t mask, Site site) {
    Thread& me = self();
    if ((mask >> me.lane & 1u) == 0) fail(site, std::string(name) + ": this lane is not in its own mask");
    for (Collective& other : me.warp->pending) {
        if ((other.mask >> me.lane & 1u) == 0) continue;  // they do not wait for this lane
        if (other.name != name && std::strcmp(other.name, name) != 0)
            fail(site, std::string(name) + " meets " + other.name + " at " + where(other.site) +
                           " of other lanes of the warp");
        if (other.mask != mask)
            fail(site,
                 std::string(name) + ": masks differ between lanes, other lanes are at " + where(other.site));
        if (kind == Kind::kAligned && !is_same_place(other.site, site))
            fail(site,
                 std::string("divergent ") + name + ": other lanes of the warp are at " + where(other.site));
        return &other;
    }
    return nullptr;
}

bool is_complete(const Collective& collective) {
    return collective.arrived == (collective.mask & lanes_alive(*self().warp));
}

void complete(size_t index) {
    Thread& me = self();
    auto& all = me.warp->pending;
    const Collective complete = all[index];
    all.erase(all.begin() + static_cast<ptrdiff_t>(index));
    complete.execute(complete, complete.closure);
    progress();
    for (Thread* thread : me.warp->lanes)
        if (thread != &me && (complete.arrived >> thread->lane & 1u) != 0) wake(*thread);
}

[[noreturn]] void fail_incomplete_warp(const char* name, Site site) {
    fail(site, std::string(name) + ": needs all 32 lanes of the warp, some do not exist or have exited");
}

// Waits for all lanes in `mask`; the last one to come runs execute(collective) for all. All lanes bring the
// same.
template <class Execute>
void together(const char* name, Kind kind, uint32_t mask, void* operand, Site site, const Execute& execute) {
    Thread& me = self();
    if (kind == Kind::kAligned && lanes_alive(*me.warp) != 0xffffffffu) fail_incomplete_warp(name, site);
    Collective* mine = pending(name, kind, mask, site);
    if (mine == nullptr) {
        const auto call = [](const Collective& complete, const void* closure) {
            (*static_cast<const Execute*>(closure))(complete);
        };
        me.warp->pending.push_back({name, kind, mask, 0, site, call, &execute, {}});
        mine = &me.warp->pending.back();
    }
    mine->operands[me.lane] = operand;
    mine->arrived |= 1u << me.lane;
    if (is_complete(*mine))
        complete(static_cast<size_t>(mine - me.warp->pending.data()));
    else
        wait_in(name, site);
}

struct ShuffleOperand {
    uint64_t value, result;
    ShuffleKind kind;
    int operand, width;
};

// The lane that `lane` reads from; itself if that lies outside its segment.
int source_lane(const ShuffleOperand& o, int lane) {
    const int first = lane & ~(o.width - 1), last = first + o.width - 1;
    switch (o.kind) {
        case ShuffleKind::kIdx:
            return first | (o.operand & (o.width - 1));
        case ShuffleKind::kUp:
            return lane - o.operand < first ? lane : lane - o.operand;
        case ShuffleKind::kDown:
            return lane + o.operand > last ? lane : lane + o.operand;
        default:
            return (lane ^ o.operand) > last ? lane : lane ^ o.operand;
    }
}

const char* shuffle_name(ShuffleKind kind) {
    switch (kind) {
        case ShuffleKind::kIdx:
            return "__shfl_sync";
        case ShuffleKind::kUp:
            return "__shfl_up_sync";
        case ShuffleKind::kDown:
            return "__shfl_down_sync";
        default:
            return "__shfl_xor_sync";
    }
}

void mma(float* d, const uint32_t* a, const uint32_t* b, bool is_bf16, Site site) {
    MmaOperands operands{d, a, b};
    together(is_bf16 ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16", Kind::kAligned, 0xffffffffu, &operands, site,
             [&](const Collective& c) { multiply_m16n8k16(c.operands, is_bf16); });
}

}  // namespace

void leave_warp() {
    Thread& me = self();
    auto& all = me.warp->pending;
    for (size_t i = all.size(); i-- > 0;) {
        if ((all[i].mask >> me.lane & 1u) == 0) continue;
        if (all[i].kind == Kind::kAligned) fail_incomplete_warp(all[i].name, all[i].site);
        if (is_complete(all[i])) complete(i);
    }
}

uint64_t shuffle(ShuffleKind kind, uint32_t mask, uint64_t value, int operand, int width) {
    const Site site = EMU_SITE;
    if (width < 1 || width > 32 || (width & (width - 1)) != 0)
        fail(site, "shuffle: width " + std::to_string(width) + ", need a power of 2 up to 32");
    ShuffleOperand mine{value, 0, kind, operand, width};
    const char* name = shuffle_name(kind);
    together(name, Kind::kSync, mask, &mine, site, [&](const Collective& c) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
            if ((c.arrived >> lane & 1u) == 0) continue;
            auto& o = *static_cast<ShuffleOperand*>(c.operands[lane]);
            const int source = source_lane(o, lane);
            if ((c.arrived >> source & 1u) == 0)
                fail(site, std::string(name) + ": lane " + std::to_string(lane) + " reads lane " +
                               std::to_string(source) + ", which does not take part");
            o.result = static_cast<const ShuffleOperand*>(c.operands[source])->value;
        }
    });
    return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
    struct Vote {
        bool predicate;
        uint32_t result;
    } mine{predicate, 0};
    together("vote", Kind::kSync, mask, &mine, EMU_SITE, [](const Collective& c) {
        uint32_t result = 0;
        for (int lane = 0; lane < kWarpSize; ++lane)
            if ((c.arrived >> lane & 1u) != 0 && static_cast<Vote*>(c.operands[lane])->predicate)
                result |= 1u << lane;
        for (int lane = 0; lane < kWarpSize; ++lane)
            if ((c.arrived >> lane & 1u) != 0) static_cast<Vote*>(c.operands[lane])->result = result;
    });
    return mine.result;
}

// The only warp-wide operation that also orders memory.
void syncwarp(uint32_t mask) {
    together("__syncwarp", Kind::kSync, mask, nullptr, EMU_SITE, [](const Collective& c) {
        if (!machine->launch.checked) return;
        std::vector<Thread*> met;
        for (Thread* thread : self().warp->lanes)
            if ((c.arrived >> thread->lane & 1u) != 0) met.push_back(thread);
        meet(met);
    });
}

void ldmatrix(uint32_t* r, int num_matrices, const void* smem_row, bool transposed) {
    const Site site = EMU_SITE;
    if (self().lane < 8 * num_matrices) {
        check_shared(smem_row, 16, 16, "ldmatrix", site);
        check_access(smem_row, 16, AccessKind::kRead, site);
    }
    LdmatrixOperands operands{r, smem_row};
    const char* name = num_matrices == 4 ? (transposed ? "ldmatrix.x4.trans" : "ldmatrix.x4")
                                         : (transposed ? "ldmatrix.x2.trans" : "ldmatrix.x2");
    together(name, Kind::kAligned, 0xffffffffu, &operands, site,
             [&](const Collective& c) { load_matrices(c.operands, num_matrices, transposed); });
}

void mma_m16n8k16_f16(float* d, const uint32_t* a, const uint32_t* b) {
    mma(d, a, b, false, EMU_SITE);
}

void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b) {
    mma(d, a, b, true, EMU_SITE);
}

// Computed at once, but d is NaN until somebody waits; products that add to it before see the sums.
void wgmma(float* d, int n, const uint32_t* a, const WgmmaMatrix& b, bool adds, bool is_bf16) {
    const Site site = EMU_SITE;
    Thread& me = self();
    for (int row = me.lane; row < 2 * n; row += kWarpSize) {  // 16 bytes each, shared out over the lanes
        const char* piece = b.data + row % 2 * b.k_step + row / 16 * b.n_step + row / 2 % 8 * 16;
        check_shared(piece, 16, 16, "wgmma", site);
        check_access(piece, 16, AccessKind::kRead, site);
    }
    const size_t count = static_cast<size_t>(n) / 2;
    auto pending = std::find_if(me.pending_sums.begin(), me.pending_sums.end(),
                                [&](const PendingSums& p) { return p.d == d; });
    if (pending == me.pending_sums.end())
        pending = me.pending_sums.insert(pending, {d, std::vector<float>(d, d + count), 0});
    if (!adds) pending->sums.assign(count, 0.0f);
    pending->group = me.wgmma_groups;
    std::fill(d, d + count, std::nanf(""));
    WgmmaOperands operands{pending->sums.data(), a, b.data, b.k_step, b.n_step};
    together(is_bf16 ? "wgmma.bf16" : "wgmma.f16", Kind::kAligned, 0xffffffffu, &operands, site,
             [&](const Collective& c) { multiply_m16k16(c.operands, n, is_bf16); });
}

void wgmma_commit() {
    ++self().wgmma_groups;
}

void wgmma_wait(int allowed_pending) {
    Thread& me = self();
    auto& all = me.pending_sums;
    for (size_t i = all.size(); i-- > 0;) {
        if (all[i].group >= me.wgmma_groups - allowed_pending) continue;
        std::copy(all[i].sums.begin(), all[i].sums.end(), all[i].d);
        all.erase(all.begin() + static_cast<ptrdiff_t>(i));
    }
}

}  // namespace emu
