#pragma once

#include <string>

namespace fd {

// CPUs that the control groups of this process grant, rounded up; 0 where they set no limit.
// `groups` is a file like /proc/self/cgroup, `root` the folder where the hierarchies are mounted.
// Containers and systemd's CPUQuota= limit time, which an affinity mask does not show: more threads
// than granted CPUs are stopped in the middle of a loop while all others wait for them.
int cpu_quota(const std::string& groups, const std::string& root);

}  // namespace fd
