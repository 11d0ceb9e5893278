// The head of Paddle's pluggable-device interface (paddle/phi/backends/device_ext.h of Paddle 3.2
// and 3.3): what this plug-in fills in. Declared here so that the plug-in builds before Paddle is
// installed; tests/unit/paddle_device/test_abi.py compares every offset with the header of the
// installed Paddle. Slots that the plug-in leaves empty are opaque pointers.
#pragma once

#include <array>
#include <cstddef>

namespace fd::paddle_abi {

enum Status { kSuccess = 0, kWarning, kFailed, kError, kInternalError };

struct DeviceId {
  int id;
};
using Device = DeviceId*;
using Stream = struct OpaqueStream*;
using Event = struct OpaqueEvent*;
using Callback = void (*)(Device, Stream, void*, Status*);
using Unused = void*;

struct DeviceInterface {
  size_t size;  // filled in by Paddle

  Status (*initialize)();
  Status (*finalize)();
  Status (*init_device)(Device);
  Status (*set_device)(Device);
  Status (*get_device)(Device);
  Status (*deinit_device)(Device);
  Status (*create_stream)(Device, Stream*);
  Status (*destroy_stream)(Device, Stream);
  Status (*query_stream)(Device, Stream);
  Status (*stream_add_callback)(Device, Stream, Callback, void*);
  Status (*create_event)(Device, Event*);
  Status (*record_event)(Device, Stream, Event);
  Status (*destroy_event)(Device, Event);
  Status (*query_event)(Device, Event);
  Status (*synchronize_device)(Device);
  Status (*synchronize_stream)(Device, Stream);
  Status (*synchronize_event)(Device, Event);
  Status (*stream_wait_event)(Device, Stream, Event);
  Unused reserved_device[8];

  Status (*device_memory_allocate)(Device, void**, size_t);
  Status (*device_memory_deallocate)(Device, void*, size_t);
  Status (*device_memory_set)(Device, void*, unsigned char, size_t);
  Status (*host_memory_allocate)(Device, void**, size_t);
  Status (*host_memory_deallocate)(Device, void*, size_t);
  Unused unified_memory[2];
  Status (*memory_copy_h2d)(Device, void*, const void*, size_t);
  Status (*memory_copy_d2h)(Device, void*, const void*, size_t);
  Status (*memory_copy_d2d)(Device, void*, const void*, size_t);
  Status (*memory_copy_p2p)(Device, Device, void*, const void*, size_t);
  Status (*async_memory_copy_h2d)(Device, Stream, void*, const void*, size_t);
  Status (*async_memory_copy_d2h)(Device, Stream, void*, const void*, size_t);
  Status (*async_memory_copy_d2d)(Device, Stream, void*, const void*, size_t);
  Status (*async_memory_copy_p2p)(Device, Device, Stream, void*, const void*, size_t);
  Unused reserved_memory[8];

  Status (*get_device_count)(size_t*);
  Status (*get_device_list)(size_t*);
  Status (*device_memory_stats)(Device, size_t*, size_t*);
  Status (*device_min_chunk_size)(Device, size_t*);
  Unused chunk_sizes[5];
  Status (*get_compute_capability)(Device, size_t*);
  Unused device_properties;
  Status (*get_runtime_version)(Device, size_t*);
  Status (*get_driver_version)(Device, size_t*);
  Status (*get_multi_process)(Device, size_t*);
  Status (*get_max_threads_per_mp)(Device, size_t*);
  Status (*get_max_threads_per_block)(Device, size_t*);
  Status (*get_max_grid_dim_size)(Device, std::array<unsigned int, 3>*);
  Status (*is_float16_supported)(Device, bool*);
  Status (*is_bfloat16_supported)(Device, bool*);
  // more follows in Paddle's struct; its size is the one that Paddle filled in
};

struct Version {
  size_t major, minor, patch;
};

struct RuntimeParams {
  size_t size;  // filled in by Paddle
  DeviceInterface* interface;
  Version version;
  char* device_type;
  char* sub_device_type;
};

/// The interface version that Paddle 3.2 and 3.3 accept.
constexpr Version kInterfaceVersion = {0, 1, 1};

}  // namespace fd::paddle_abi
