"""What lies behind an exception: memory that is not there, a peer that has gone, a disk that will stay full.

By this a start of a run says whether another start may help (`runs.outcome`).  What cannot be told, a bug or a broken
driver, is tried again: `guard.max_restarts` bounds how often.
"""

from __future__ import annotations

import errno

from mirai_ds.config.errors import LocalError, UserError

# Disk full, quota, permissions, and limits of this user or of names: the next start meets them again.
NOT_FIXED_BY_RESTART = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EMFILE, errno.ENAMETOOLONG,
    errno.ELOOP,
}  # fmt: skip
_OF_DEVICES = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_OF_HOSTS = ("can't allocate memory", "Cannot allocate memory")  # torch's allocator and its mappings

_OF_LOST_PEERS = ("onnection reset by peer", "onnection closed by peer", "roken pipe", "emote process exited",
                  "onnection was likely closed")  # fmt: skip


def lacking_memory(error: BaseException) -> str:
    """Which memory was too small, as words for a sentence; empty when the failure is another."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or any(part in text for part in _OF_DEVICES):
        return "GPU memory"
    of_host = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if of_host or (isinstance(error, RuntimeError) and any(part in text for part in _OF_HOSTS)):
        return "memory of this machine"
    return ""


def gist(error: BaseException) -> str:
    """The message of a failed allocation in one line, without PyTorch's general advice at its end."""
    text = " ".join(str(error).partition(" If reserved but unallocated")[0].split())
    return text or type(error).__name__


def lost_a_peer(error: BaseException) -> bool:
    """Whether a collective, or a question to the key-value store, failed because another process ended; that one knows
    why."""
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OF_LOST_PEERS)


def mistake_behind(error: BaseException, steps_done: int) -> UserError | None:
    """What the user has to mend before another start of a run can go further; None where a start may help by itself.

    steps_done: by this start.  Memory that was enough for a step and is not later may be enough for the next start.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in NOT_FIXED_BY_RESTART:
        return LocalError(f"{error.filename or 'the run folder'}: {error.strerror}; the earlier checkpoints are intact")
    lacking = lacking_memory(error)
    if lacking and steps_done == 0:
        return LocalError(
            f"out of {lacking} before the first step of this start was done ({gist(error)}); lower "
            "train.micro_batch_size, or recompute more (train.recompute.policy: full); `mirai-ds plan RECIPE` says "
            "what fits"
        )
    return None
