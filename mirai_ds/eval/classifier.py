"""How recognisable generated images are to a classifier that has seen only real training images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class ClassifierScore(NamedTuple):
    """Share of images whose class is recognised."""

    real: float
    generated: float

    @property
    def ratio(self) -> float:
        """The accuracy on generated images divided by that on real ones."""
        return self.generated / self.real


def classifier_score(
    train: tuple[Array, Array], held_out: tuple[Array, Array], generated: tuple[Array, Array]
) -> ClassifierScore:
    """Each argument: uint8 images (n, H, W, C) and labels (n,).  A support vector machine on pixels (scikit-learn's
    own example for its digits: RBF kernel, here gamma 'scale') learns `train` and judges the other two."""
    from sklearn.svm import SVC

    def flat(images: Array) -> Array:
        return images.reshape(len(images), -1).astype(np.float32) / 255.0

    machine = SVC().fit(flat(train[0]), train[1])
    real = float(machine.score(flat(held_out[0]), held_out[1]))
    return ClassifierScore(real, float(machine.score(flat(generated[0]), generated[1])))
