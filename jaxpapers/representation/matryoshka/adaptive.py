"""Adaptive classification (MRL-AC): a cascade over the sizes that stops where a head is sure (Sec. 4.2.1, App. D, J).

Probabilities are those of all heads, stacked from the smallest size on; where they are asked again and again, once for
every split of the samples, `head_answers` reduces them beforehand. Where the text and the authors' notebook differ,
this is the notebook: thresholds from 0.1 to 1; a head is believed where its confidence is above (>) its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpapers.ops.checks import check_labels
from jaxpapers.representation.matryoshka.prefixes import check_nesting
from jaxpapers.typing import AnyArray


def mirrored_probabilities(
    logits: Float[AnyArray, "*batch classes"], mirrored: Float[AnyArray, "*batch classes"]
) -> Float[Array, "*batch classes"]:
    """Softmax of the sum of the logits of an image and of its mirror image (the paper's test-time augmentation)."""
    return jax.nn.softmax(jnp.asarray(logits) + mirrored, axis=-1)


class HeadAnswers(NamedTuple):
    """What a cascade needs of the probabilities: two numbers a head and sample, however many classes there are.

    Attributes:
        prediction: the likeliest class.
        confidence: its probability.
    """

    prediction: Int[AnyArray, "sizes samples"]
    confidence: Float[AnyArray, "sizes samples"]


def head_answers(probs: Float[AnyArray, "sizes samples classes"]) -> HeadAnswers:
    """Class and confidence of every head.

    Raises:
        ValueError: probabilities outside of [0, 1].
    """
    _check_probabilities(probs)
    return HeadAnswers(jnp.argmax(jnp.asarray(probs), axis=-1), jnp.max(jnp.asarray(probs), axis=-1))


def threshold_grid() -> Float[np.ndarray, "100"]:
    """The candidates of the authors' notebook: 100 from 0.1 to 1."""
    return np.linspace(0.1, 1, 100)


def learn_thresholds(
    probs: Float[AnyArray, "sizes samples classes"] | HeadAnswers,
    labels: Int[AnyArray, "samples"],
    grid: Float[AnyArray, "grid"] | None = None,
) -> Float[Array, "pairs"]:
    """A threshold for every head but the last, from calibration samples, one pair of neighbouring heads at a time.

    For a threshold t the pair predicts by the smaller head where its confidence is above t, by the larger one
    elsewhere; t* is the smallest t among those with the best accuracy.

    Args:
        probs: of every head, or their `head_answers`.
        labels: of the samples.
        grid: candidates, rising; None: `threshold_grid`.

    Raises:
        ValueError: no samples, or no pair of heads; probabilities outside of [0, 1], labels out of range (answers do
            not say how many classes there are); a grid that is empty or does not rise.
    """
    answers = _answers(probs)
    heads, samples = answers.confidence.shape
    if samples == 0 or heads < 2:
        raise ValueError(f"thresholds need calibration samples and two heads, got {samples} samples and {heads} heads")
    candidates = threshold_grid() if grid is None else grid
    if not isinstance(candidates, jax.core.Tracer) and not (len(candidates) and (np.diff(candidates) > 0).all()):
        raise ValueError(f"grid must rise and not be empty, got {np.asarray(candidates)}")
    if not isinstance(probs, HeadAnswers):
        check_labels(labels, probs.shape[-1])
    right = jnp.asarray(answers.prediction) == jnp.asarray(labels)
    confidence = jnp.asarray(answers.confidence)
    candidates = jnp.asarray(candidates, confidence.dtype)

    def pair(sure: Array, small: Array, large: Array) -> Array:
        counts = jnp.sum(jnp.where(sure > candidates[:, None], small, large), axis=1)
        return candidates[jnp.argmax(counts)]  # the first of equals

    return jax.vmap(pair)(confidence[:-1], right[:-1], right[1:])


class CascadeResult(NamedTuple):
    """What a cascade says of every sample.

    Attributes:
        prediction: class.
        exit_index: number of the head that was believed.
    """

    prediction: Int[Array, "samples"]
    exit_index: Int[Array, "samples"]


def cascade(
    probs: Float[AnyArray, "sizes samples classes"] | HeadAnswers,
    thresholds: Float[AnyArray, "pairs"],
    max_exit: int | None = None,
) -> CascadeResult:
    """The first head whose confidence is above its threshold, or the last that may be used.

    Args:
        probs: of every head, or their `head_answers`.
        thresholds: of every head but the last.
        max_exit: number of the last head that may be used; None: all. The samples that would have gone beyond it stop
            there, the others where they stop without it.

    Raises:
        ValueError: not one threshold for every head but the last; a head that does not exist; probabilities outside
            of [0, 1].
    """
    answers = _answers(probs)
    heads = answers.confidence.shape[0]
    if thresholds.shape != (heads - 1,):
        raise ValueError(f"{heads} heads need {heads - 1} thresholds, got shape {thresholds.shape}")
    last = heads - 1 if max_exit is None else max_exit
    if not 0 <= last < heads:
        raise ValueError(f"max_exit must be between 0 and {heads - 1}, got {max_exit}")
    predictions, confidence = (jnp.asarray(part)[: last + 1] for part in answers)
    limits = jnp.append(jnp.asarray(thresholds, confidence.dtype)[:last], -jnp.inf)  # the last is always believed
    exit_index = jnp.argmax(confidence > limits[:, None], axis=0)
    return CascadeResult(jnp.take_along_axis(predictions, exit_index[None], axis=0)[0], exit_index)


def expected_size(
    exit_index: Int[AnyArray, "samples"], nesting: Sequence[int], cumulative: bool = False
) -> Float[Array, ""]:
    """E[m] of the exits.

    Args:
        exit_index: of every sample.
        nesting: sizes of the heads.
        cumulative: E[sum of m_j over j <= exit]: the cost of separate heads (MRL), of which each sees its whole prefix;
            MRL-E adds to the logits that it has.

    Raises:
        ValueError: a nesting that does not rise; exits that are no heads.
    """
    sizes = np.asarray(check_nesting(nesting, nesting[-1] if len(nesting) else 0))
    check_labels(exit_index, len(sizes))
    cost = np.cumsum(sizes) if cumulative else sizes
    return jnp.mean(jnp.asarray(cost, jnp.result_type(float))[exit_index])


def oracle_accuracy(
    probs: Float[AnyArray, "sizes samples classes"] | HeadAnswers, labels: Int[AnyArray, "samples"]
) -> Float[Array, ""]:
    """Share of the samples that any head has right: no cascade can do better (App. J).

    Args:
        probs: of every head, or their `head_answers`.
        labels: of the samples.

    Raises:
        ValueError: probabilities outside of [0, 1], labels out of range (answers do not say how many classes there
            are).
    """
    if not isinstance(probs, HeadAnswers):
        check_labels(labels, probs.shape[-1])
    answers = _answers(probs)
    right = jnp.asarray(answers.prediction) == jnp.asarray(labels)
    return jnp.mean(jnp.any(right, axis=0).astype(answers.confidence.dtype))


def majority_vote(probs: Float[AnyArray, "sizes samples classes"] | HeadAnswers) -> Int[Array, "samples"]:
    """The class that most heads predict; of equals the one with the lower number (App. J).

    Args:
        probs: of every head, or their `head_answers`.

    Raises:
        ValueError: probabilities outside of [0, 1].
    """
    predictions = jnp.asarray(_answers(probs).prediction)
    # Heads are fewer than classes: each prediction is compared with the others, no vote is kept for every class.
    votes = jnp.sum(predictions[:, None] == predictions, axis=1)
    return jnp.min(jnp.where(votes == jnp.max(votes, axis=0), predictions, jnp.iinfo(predictions.dtype).max), axis=0)


def _answers(probs: AnyArray | HeadAnswers) -> HeadAnswers:
    return probs if isinstance(probs, HeadAnswers) else head_answers(probs)


def _check_probabilities(probs: AnyArray) -> None:
    if isinstance(probs, jax.core.Tracer):
        return
    low, high = np.min(probs, initial=0), np.max(probs, initial=0)  # NaN fails both comparisons
    if not (low >= 0 and high <= 1 + 1e-6):  # rounding of a softmax in float32
        raise ValueError(f"probabilities must lie in [0, 1], got {low} to {high}")
