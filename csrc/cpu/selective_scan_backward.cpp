#include "cpu/selective_scan.h"
namespace ssmkit::SSMKIT_CAPABILITY {
void selective_scan_backward(const SelectiveScanBackward&) {}
}
