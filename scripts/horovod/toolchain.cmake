# CMAKE_TOOLCHAIN_FILE with which Horovod 0.28.1, as published, compiles against TensorFlow 2.19 and newer.
#
# horovod/tensorflow/xla_mpi_ops.cc needs headers that these TensorFlow packages do not have. It only serves
# HOROVOD_ENABLE_XLA_OPS=1, which cnnopt does not use. gpu_stream.cc is compiled instead of it.
include_guard(GLOBAL)

# GCC 14 refuses two headers. horovod/common/common.h throws std::logic_error without including its header. The span of
# flatbuffers assigns to a const member, in a function that nothing calls. A copy without that "const" is found first.
set(span flatbuffers/include/flatbuffers/stl_emulation.h)
if(EXISTS "${CMAKE_SOURCE_DIR}/third_party/${span}")
    file(READ "${CMAKE_SOURCE_DIR}/third_party/${span}" text)
    string(REPLACE "const size_type count_;" "size_type count_;" text "${text}")
    file(WRITE "${CMAKE_BINARY_DIR}/${span}" "${text}")
endif()
string(APPEND CMAKE_CXX_FLAGS_INIT " -include stdexcept -iquote ${CMAKE_BINARY_DIR}/flatbuffers/include")

# CMake keeps the original of a command that is defined again under the same name with a leading underscore.
function(add_library)
    list(TRANSFORM ARGV REPLACE "^.*/xla_mpi_ops\\.cc$" "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/gpu_stream.cc")
    _add_library(${ARGV})
endfunction()
