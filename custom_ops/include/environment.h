// Environment variables that native code reads itself.
#pragma once
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <string>

namespace fd {

// The variable as one word: without blanks around it, in small letters; "" where it is not set.
inline std::string environment_word(const char* name) {
  const char* text = std::getenv(name);
  std::string word = text == nullptr ? "" : text;
  const char* blanks = " \t\r\n\v\f";
  word.erase(0, word.find_first_not_of(blanks));  // all of it where there are only blanks
  word.erase(word.find_last_not_of(blanks) + 1);
  std::transform(word.begin(), word.end(), word.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return word;
}

}  // namespace fd
