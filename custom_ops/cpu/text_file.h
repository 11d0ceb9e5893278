#pragma once

#include <cstdio>
#include <string>

namespace fd {

// Empty for a file that cannot be read. C streams: those of C++ find their locale's facets by ids
// that two copies of libstdc++ in one process share, and with a module that carries its own copy,
// as some toolchains link it, reading a number jumped into the wrong facet.
inline std::string file_text(const std::string& path) {
  std::string text;
  if (FILE* file = std::fopen(path.c_str(), "re")) {
    char part[512];
    for (size_t n; (n = std::fread(part, 1, sizeof part, file)) > 0;) text.append(part, n);
    std::fclose(file);
  }
  return text;
}

}  // namespace fd
