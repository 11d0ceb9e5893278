// Small kernels that keep a rule of CUDA or break it, for the tests of the card in memory itself.
#pragma once

#include <string>
#include <vector>

namespace card {

std::vector<std::string> rule_names();
/// Whether the kernel that keeps the rule, or the one that breaks it, computes what it should.
bool right(const std::string& rule, bool kept);

}  // namespace card
