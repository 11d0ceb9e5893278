#include "plan_cards.h"

namespace fd::cuda {
namespace {

// clang-format off
constexpr CardTable kTables[] = {
    // from  measured  small    large    mma   of large  direct  stream  means of
    // cc              weight   weight   rows  weights   tokens  tokens  8, 16, 32
    {8,      false,    8 << 20, 64 << 20, 64,  32,       2,      16,     {6, 12, 32}},
    {9,      true,     8 << 20, 64 << 20, 64,  32,       2,      16,     {6, 12, 32}},
    {10,     false,    8 << 20, 64 << 20, 64,  32,       2,      16,     {6, 12, 32}},
};
// clang-format on

}  // namespace

const CardTable& card_table(int major) {
  const CardTable* found = kTables;
  for (const CardTable& row : kTables) {
    if (row.major <= major) found = &row;
  }
  return *found;
}

}  // namespace fd::cuda
