#pragma once
// Registering (pinning) long ranges with a device.

#include <cstddef>
#include <vector>

#include "slidecore/device.h"

namespace slidecore::memory {

// Some drivers refuse, or take very long for, larger ranges in one call.
inline constexpr std::size_t kRegistrationPiece = std::size_t{64} << 30;

// Returns the start of each piece. On failure nothing stays registered, and the Error says what to do.
std::vector<void*> register_pieces(const Device& device, void* data, std::size_t bytes,
                                   std::size_t piece_bytes = kRegistrationPiece);

// Unregisters in reverse order. Reports failures on stderr: this runs in destructors, and the driver may already
// be gone at exit.
void unregister_pieces(const Device& device, std::vector<void*>& pieces) noexcept;

}  // namespace slidecore::memory
