"""Stand-ins of other folders' tests."""

from tests.eval.conftest import inception_file, inception_state
from tests.sampling.conftest import tiny

__all__ = ["inception_file", "inception_state", "tiny"]
