# CMAKE_TOOLCHAIN_FILE with which Horovod 0.28.1, as published, compiles against TensorFlow 2.19 and newer.
#
# horovod/tensorflow/xla_mpi_ops.cc needs headers that these TensorFlow packages do not have. It only serves
# HOROVOD_ENABLE_XLA_OPS=1, which cnnopt does not use. gpu_stream.cc is compiled instead of it.
include_guard(GLOBAL)

# CMake keeps the original of a command that is defined again under the same name with a leading underscore.
function(add_library)
    list(TRANSFORM ARGV REPLACE "^.*/xla_mpi_ops\\.cc$" "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/gpu_stream.cc")
    _add_library(${ARGV})
endfunction()
