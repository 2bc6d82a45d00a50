# No GPU asked for: DeepSpeed must not guess, and glibc shall keep the large blocks of a step for the next one.
export DS_ACCELERATOR=cpu MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296
