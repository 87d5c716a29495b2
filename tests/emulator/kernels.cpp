// The kernels on the emulator; compiled for each head_dim, as by nvcc.
#include "cuda/attention_sm90_kernels.cu"
