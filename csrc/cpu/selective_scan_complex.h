#pragma once
#include "cpu/selective_scan_plan.h"
namespace ssmkit::SSMKIT_CAPABILITY { namespace { inline void complex_forward(const SelectiveScanForward&) {}
inline void complex_backward(const SelectiveScanBackward&) {} } }
