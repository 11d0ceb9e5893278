// Reading a file into memory while its checksums are taken, and checksums of memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor_view.h"

namespace fd {

// Bytes that one checksum covers. Four of them are computed side by side, in a core's own cache.
constexpr int64_t kChecksumBytes = 256 << 10;

// CRC-32C (Castagnoli), as in iSCSI, ext4 and RFC 3720: that of "123456789" is 0xe3069283.
uint32_t crc32c(const uint8_t* data, size_t bytes);

// sums: int32, one for each kChecksumBytes of `data`, the last for what is left; no gaps in either.
// Throws std::invalid_argument that names the argument.
void checksums(const TensorView& data, const TensorView& sums);

// Fills `data` from byte `offset` of an open file on all threads, and `sums` as above. Returns 0,
// an errno, or ENODATA where the file ends before; the contents are then undefined.
int read_checked(int file, int64_t offset, const TensorView& data, const TensorView& sums);

}  // namespace fd
