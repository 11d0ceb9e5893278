#include "cpu_topology.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "text_file.h"

namespace fd {
namespace {

// A list that names more is no list of CPUs.
constexpr long kMostCpus = 65536;

bool contains(const std::vector<int>& values, int value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

std::vector<int> common(const std::vector<int>& values, const std::vector<int>& others) {
  std::vector<int> both;
  for (int value : values) {
    if (contains(others, value)) both.push_back(value);
  }
  return both;
}

long capacity_of(const std::string& devices, int cpu) {
  const std::string folder = devices + "/system/cpu/cpu" + std::to_string(cpu);
  return std::strtol(file_text(folder + "/cpu_capacity").c_str(), nullptr, 10);
}

std::vector<int> by_capacity(const std::string& devices, const std::vector<int>& allowed) {
  std::vector<long> capacities;
  for (int cpu : allowed) capacities.push_back(capacity_of(devices, cpu));
  const long most = *std::max_element(capacities.begin(), capacities.end());
  std::vector<int> fast;
  for (size_t i = 0; i < allowed.size(); ++i) {
    if (2 * capacities[i] >= most) fast.push_back(allowed[i]);
  }
  return fast;
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string& text) {
  std::vector<int> cpus;
  const char* at = text.c_str();
  while (*at >= '0' && *at <= '9') {
    char* end = nullptr;
    const long first = std::strtol(at, &end, 10);
    long last = first;
    if (*end == '-') last = std::strtol(end + 1, &end, 10);
    if (last < first || last >= kMostCpus) return {};
    for (long cpu = first; cpu <= last; ++cpu) cpus.push_back(static_cast<int>(cpu));
    at = *end == ',' ? end + 1 : end;
  }
  return *at == 0 || *at == '\n' ? cpus : std::vector<int>{};
}

std::vector<int> performance_cpus(const std::string& devices, const std::vector<int>& allowed) {
  if (allowed.empty()) return allowed;
  const std::vector<int> cores = parse_cpu_list(file_text(devices + "/cpu_core/cpus"));
  const std::vector<int> fast =
      cores.empty() ? by_capacity(devices, allowed) : common(allowed, cores);
  return fast.empty() ? allowed : fast;
}

std::vector<int> nodes_of(const std::string& devices, const std::vector<int>& cpus) {
  const std::string folder = devices + "/system/node/";
  std::vector<int> nodes;
  for (int node : parse_cpu_list(file_text(folder + "has_memory"))) {
    const std::string list = file_text(folder + "node" + std::to_string(node) + "/cpulist");
    if (!common(cpus, parse_cpu_list(list)).empty()) nodes.push_back(node);
  }
  return nodes;
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
  const int count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (int cpu = 0; cpus.empty() && cpu < count; ++cpu) cpus.push_back(cpu);
  return cpus;
}

}  // namespace fd
