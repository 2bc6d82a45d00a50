# Collectives: warnings only, but always; a failed one then says why.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Segments that grow: gathered ZeRO-3 parameters and recomputation leave fewer holes in GPU memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
