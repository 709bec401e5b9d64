// Shared memory: poisoned, between guard zones, each piece at no better an alignment than it asked for.
#include <cstring>
#include <sstream>

#include "cuda_vocabulary.h"
#include "machine.h"

namespace emu {
namespace {

constexpr size_t kGuardBytes = 1024;
constexpr char kPoison = static_cast<char>(0xff);  // NaN in every float format, and so is the next
constexpr char kGuard = static_cast<char>(0xfe);

SharedPiece make_piece(size_t bytes, size_t alignment) {
    SharedPiece piece;
    piece.bytes = bytes;
    piece.storage_bytes = bytes + 2 * kGuardBytes + 2 * alignment;
    piece.storage = std::make_unique<char[]>(piece.storage_bytes);
    std::memset(piece.storage.get(), kGuard, piece.storage_bytes);
    uintptr_t start = reinterpret_cast<uintptr_t>(piece.storage.get()) + kGuardBytes;
    start = (start + alignment - 1) / alignment * alignment;
    if (start % (2 * alignment) == 0) start += alignment;
    piece.data = reinterpret_cast<char*>(start);
    std::memset(piece.data, kPoison, bytes);
    if (machine->launch.checked) piece.shadow = std::make_unique<Shadow>(piece.data, bytes, false);
    return piece;
}

SharedPiece* piece_around(Block& block, const void* address, bool with_guards) {
    const char* a = static_cast<const char*>(address);
    for (SharedPiece& piece : block.shared) {
        const char* storage = piece.storage.get();
        if (with_guards ? a >= storage && a < storage + piece.storage_bytes
                        : a >= piece.data && a < piece.data + piece.bytes)
            return &piece;
    }
    return nullptr;
}

}  // namespace

void create_shared(Block& block, size_t bytes) {
    block.shared.push_back(make_piece(bytes, 128));
}

unsigned char* dynamic_shared() {
    return reinterpret_cast<unsigned char*>(self().block->shared[0].data);
}

void* static_shared(const void* declaration, size_t bytes, size_t alignment) {
    Block& block = *self().block;
    const auto [at, is_new] = block.static_at.emplace(declaration, static_cast<int>(block.shared.size()));
    if (is_new) block.shared.push_back(make_piece(bytes, std::max<size_t>(alignment, 16)));
    return block.shared[at->second].data;
}

Shadow* shared_shadow(Block& block, const void* address) {
    SharedPiece* piece = piece_around(block, address, false);
    return piece == nullptr ? nullptr : piece->shadow.get();
}

void check_guard_zones(const Block& block) {
    for (const SharedPiece& piece : block.shared) {
        const char* kind = &piece == block.shared.data() ? "shared" : "static shared";
        const char* begin = piece.storage.get();
        for (const char* c = begin; c < begin + piece.storage_bytes; ++c) {
            if (c == piece.data && piece.bytes > 0) c += piece.bytes;
            if (*c == kGuard) continue;
            std::ostringstream text;
            text << "block " << block.number << " wrote out of bounds: " << kind << std::showpos
                 << c - piece.data << std::noshowpos << " (of " << piece.bytes << " bytes)";
            throw Error(text.str());
        }
    }
}

void check_aligned(const void* address, size_t alignment, const char* what, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0)
        fail(site, std::string(what) + ": " + name_of(address) + " is not aligned to " +
                       std::to_string(alignment) + " bytes");
}

void check_shared(const void* address, size_t bytes, size_t alignment, const char* what, Site site) {
    const SharedPiece* piece = piece_around(*self().block, address, false);
    const char* a = static_cast<const char*>(address);
    if (piece == nullptr || a + bytes > piece->data + piece->bytes)
        fail(site, std::string(what) + ": " + std::to_string(bytes) + " bytes at " + name_of(address) +
                       " are not within this block's shared memory");
    check_aligned(address, alignment, what, site);
}

std::string name_of(const void* address) {
    std::ostringstream text;
    const char* a = static_cast<const char*>(address);
    for (Block& block : machine->resident) {
        const SharedPiece* piece = piece_around(block, address, true);
        if (piece == nullptr) continue;
        if (machine->running != nullptr && &block != self().block) text << "block " << block.number << "'s ";
        text << (piece == block.shared.data() ? "shared" : "static shared") << std::showpos << a - piece->data
             << std::noshowpos << " (of " << piece->bytes << " bytes)";
        return text.str();
    }
    if (const auto* buffer = buffer_at(address)) {
        text << buffer->second.name << std::showpos
             << static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) - buffer->first) << std::noshowpos
             << " (of " << buffer->second.bytes << " bytes)";
        return text.str();
    }
    text << "address " << address;
    return text.str();
}

}  // namespace emu
