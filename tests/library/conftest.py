"""The finished run of the training tests is what is loaded here."""

from tests.train.conftest import finished

__all__ = ["finished"]
