// What the kernel says of this machine's cores and memory nodes.
#pragma once

#include <string>
#include <vector>

namespace fd {

// Numbers of a list such as "0-3,8"; empty for a text that is none.
std::vector<int> parse_cpu_list(const std::string& text);

// Those of `allowed` that are performance cores, where cores differ: those of Intel's cpu_core
// device, else those of at least half the largest cpu_capacity. All of `allowed` where they do not
// differ, where nothing is known, or where only slower ones are allowed. A loop ends with its
// slowest thread, so that a slow core beside fast ones costs more than it gives. `devices` is a
// folder like /sys/devices.
std::vector<int> performance_cpus(const std::string& devices, const std::vector<int>& allowed);

// Memory nodes that hold one of `cpus`; empty where the kernel names none.
std::vector<int> nodes_of(const std::string& devices, const std::vector<int>& cpus);

// CPUs in the affinity mask of the process; never empty.
std::vector<int> allowed_cpus();

}  // namespace fd
