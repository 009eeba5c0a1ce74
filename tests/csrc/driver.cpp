// Runs the cases of one op: `<op> CAPABILITY`. Returns 0 if all pass, 1 if one fails, 2 if this CPU lacks the capability.
#include "harness.h"

int main(int count, char** arguments) {
  if (count != 2) return 1;
  if (const char* refusal = ssmkit::set_cpu_capability(arguments[1])) {
    std::printf("%s: %s\n", arguments[1], refusal);
    return 2;
  }
  for (const auto* one : ssmkit::testing::Case::all()) {
    const int before = ssmkit::testing::failures();
    one->run();
    std::printf("%s %s\n", ssmkit::testing::failures() == before ? "ok" : "FAIL", one->name);
  }
  return ssmkit::testing::failures() ? 1 : 0;
}
