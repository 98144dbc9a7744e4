// The CUDA device of a build without one.
#include "core/check.h"
#include "device/device.h"

namespace mla {

std::unique_ptr<Device> make_cuda(int) { fail_input("this build has no CUDA device; use --device cpu"); }

}  // namespace mla
