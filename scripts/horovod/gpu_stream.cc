// Horovod asks TensorFlow for the CUDA stream of an operation with AsGpuStreamValue, which TensorFlow 2.19 removed.
// This is the same question in today's terms. A build without GPUs leaves the file empty.
#if HAVE_CUDA
#include <cuda_runtime.h>

#include "xla/stream_executor/stream.h"

namespace stream_executor {
namespace gpu {

cudaStream_t AsGpuStreamValue(Stream* stream) {
  return static_cast<cudaStream_t>(stream->platform_specific_handle().stream);
}

}  // namespace gpu
}  // namespace stream_executor
#endif  // HAVE_CUDA
