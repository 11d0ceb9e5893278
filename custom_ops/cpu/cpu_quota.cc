#include "cpu_quota.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

namespace fd {
namespace {

constexpr double kNone = 0;

double ratio(double quota, double period) {
  return quota > 0 && period > 0 ? quota / period : kNone;
}

double number_in(const std::string& path) {
  std::ifstream file(path);
  double value = 0;
  return file >> value ? value : 0;
}

// Version 2: "max 100000" or "150000 100000" (microseconds a period).
double quota_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max") return kNone;
  return ratio(std::strtod(quota.c_str(), nullptr), period);
}

double quota_v1(const std::string& folder) {
  return ratio(number_in(folder + "/cpu.cfs_quota_us"), number_in(folder + "/cpu.cfs_period_us"));
}

double smaller(double a, double b) { return a == kNone ? b : b == kNone ? a : std::min(a, b); }

// A group may be limited by any of its ancestors.
template <typename Quota>
double strictest(const std::string& mount, std::string path, Quota quota) {
  double least = quota(mount);
  while (path.size() > 1) {
    least = smaller(least, quota(mount + path));
    path.resize(path.rfind('/'));
  }
  return least;
}

}  // namespace

int cpu_quota(const std::string& groups, const std::string& root) {
  std::ifstream file(groups);
  double least = kNone;
  for (std::string line; std::getline(file, line);) {  // "id:controllers:path"
    std::istringstream parts(line);
    std::string id, controllers, path;
    std::getline(parts, id, ':');
    std::getline(parts, controllers, ':');
    std::getline(parts, path);
    if (path.empty() || path[0] != '/') continue;
    if (controllers.empty()) {
      least = smaller(least, strictest(root, path, quota_v2));
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      least = smaller(least, strictest(root + "/cpu", path, quota_v1));
    }
  }
  return least == kNone ? 0 : std::max(1, static_cast<int>(std::ceil(least)));
}

}  // namespace fd
