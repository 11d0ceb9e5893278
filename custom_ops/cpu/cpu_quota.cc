#include "cpu_quota.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "text_file.h"

namespace fd {
namespace {

constexpr double kNone = 0;

double ratio(double quota, double period) {
  return quota > 0 && period > 0 ? quota / period : kNone;
}

// A first word that is no number ("max") counts as 0.
double number_in(const std::string& path) { return std::strtod(file_text(path).c_str(), nullptr); }

// Version 2: "max 100000" or "150000 100000" (microseconds a period).
double quota_v2(const std::string& folder) {
  const std::string text = file_text(folder + "/cpu.max");
  char* rest = nullptr;
  const double quota = std::strtod(text.c_str(), &rest);
  return rest == text.c_str() ? kNone : ratio(quota, std::strtod(rest, nullptr));
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
  const std::string text = file_text(groups);
  double least = kNone;
  for (size_t start = 0; start < text.size();) {  // "id:controllers:path"
    const size_t end = std::min(text.find('\n', start), text.size());
    const std::string line = text.substr(start, end - start);
    start = end + 1;
    const size_t first = line.find(':');
    const size_t second = first == line.npos ? line.npos : line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
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
