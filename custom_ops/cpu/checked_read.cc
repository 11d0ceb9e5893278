#include "checked_read.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "cpu_features.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace fd {
namespace {

constexpr int kLanes = 4;
// What a thread reads at a time: from the disk in order, and back from its cache for the checksums.
constexpr int64_t kPiece = kLanes * kChecksumBytes;

struct Tables {
  uint32_t of[8][256];
  Tables() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
      of[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; ++i) {
      for (int t = 1; t < 8; ++t) of[t][i] = of[t - 1][i] >> 8 ^ of[0][of[t - 1][i] & 255];
    }
  }
};

// Without the instruction: eight bytes a step, by tables.
uint32_t crc_by_tables(uint32_t crc, const uint8_t* data, size_t bytes) {
  static const Tables tables;
  for (; bytes >= 8; bytes -= 8, data += 8) {
    uint32_t next = 0;
    for (int i = 0; i < 8; ++i) {
      const uint32_t byte = i < 4 ? (crc >> 8 * i & 255) ^ data[i] : data[i];
      next ^= tables.of[7 - i][byte];
    }
    crc = next;
  }
  for (; bytes > 0; --bytes) crc = crc >> 8 ^ tables.of[0][(crc ^ *data++) & 255];
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc_by_instruction(uint32_t crc, const uint8_t* data,
                                                              size_t bytes) {
  for (; bytes >= 8; bytes -= 8, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, sizeof(word));
    crc = static_cast<uint32_t>(_mm_crc32_u64(crc, word));
  }
  for (; bytes > 0; --bytes) crc = _mm_crc32_u8(crc, *data++);
  return crc;
}

// Four at a time: the instruction takes three cycles and can begin every one.
__attribute__((target("sse4.2"))) void four_sums(const uint8_t* data, int32_t* sums) {
  uint64_t crc[kLanes];
  std::fill(crc, crc + kLanes, 0xffffffffu);
  for (int64_t at = 0; at < kChecksumBytes; at += 8) {
    for (int lane = 0; lane < kLanes; ++lane) {
      uint64_t word;
      std::memcpy(&word, data + lane * kChecksumBytes + at, sizeof(word));
      crc[lane] = _mm_crc32_u64(crc[lane], word);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = static_cast<int32_t>(~crc[lane]);
}

// Every set beyond the plain one has it.
bool has_instruction() { return current_isa() != Isa::kPlain; }
#else
bool has_instruction() { return false; }
uint32_t crc_by_instruction(uint32_t, const uint8_t*, size_t) { return 0; }
void four_sums(const uint8_t*, int32_t*) {}
#endif

// Of at most one piece.
void sums_of_piece(const uint8_t* data, int64_t bytes, int32_t* sums) {
  if (bytes == kPiece && has_instruction()) {
    four_sums(data, sums);
    return;
  }
  for (int64_t at = 0; at < bytes; at += kChecksumBytes) {
    const int64_t some = std::min(kChecksumBytes, bytes - at);
    *sums++ = static_cast<int32_t>(crc32c(data + at, some));
  }
}

int read_all(int file, uint8_t* to, int64_t bytes, int64_t offset) {
  while (bytes > 0) {
    const ssize_t got = pread(file, to, bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return got < 0 ? errno : ENODATA;
    to += got;
    offset += got;
    bytes -= got;
  }
  return 0;
}

int64_t checked_bytes(const TensorView& data, const TensorView& sums) {
  data.check_contiguous("data");
  sums.check_contiguous("sums");
  sums.as<int32_t>("sums");
  const int64_t bytes = data.size() * dtype_size(data.dtype);
  sums.check_rank("sums", 1).check_extent("sums", 0, (bytes + kChecksumBytes - 1) / kChecksumBytes);
  return bytes;
}

// function(first, bytes) for all pieces, in ascending order: a disk is then read as it likes best.
template <typename Function>
void for_each_piece(int64_t bytes, const Function& function) {
  std::atomic<int64_t> next{0};
  const int64_t pieces = (bytes + kPiece - 1) / kPiece;
  parallel_for(std::min<int64_t>(pieces, num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (;;) {
        const int64_t first = next.fetch_add(kPiece, std::memory_order_relaxed);
        if (first >= bytes) break;
        function(first, std::min(kPiece, bytes - first));
      }
    }
  });
}

}  // namespace

uint32_t crc32c(const uint8_t* data, size_t bytes) {
  return ~(has_instruction() ? crc_by_instruction(~0u, data, bytes)
                             : crc_by_tables(~0u, data, bytes));
}

void checksums(const TensorView& data, const TensorView& sums) {
  const int64_t bytes = checked_bytes(data, sums);
  const uint8_t* from = static_cast<const uint8_t*>(data.data);
  int32_t* to = static_cast<int32_t*>(sums.data);
  for_each_piece(bytes, [&](int64_t first, int64_t some) {
    sums_of_piece(from + first, some, to + first / kChecksumBytes);
  });
}

int read_checked(int file, int64_t offset, const TensorView& data, const TensorView& sums) {
  const int64_t bytes = checked_bytes(data, sums);
  uint8_t* to = static_cast<uint8_t*>(data.data);
  int32_t* of = static_cast<int32_t*>(sums.data);
  std::atomic<int> failed{0};
  for_each_piece(bytes, [&](int64_t first, int64_t some) {
    if (failed.load(std::memory_order_relaxed) != 0) return;
    const int error = read_all(file, to + first, some, offset + first);
    if (error != 0) {
      failed.store(error, std::memory_order_relaxed);
    } else {
      sums_of_piece(to + first, some, of + first / kChecksumBytes);
    }
  });
  return failed.load(std::memory_order_relaxed);
}

}  // namespace fd
