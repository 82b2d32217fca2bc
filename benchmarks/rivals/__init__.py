"""One training update of a paper by its authors' algorithm in PyTorch, beside ours: a file a paper.

A rival is written after the paper's description as a user of PyTorch writes it: modules of torch.nn, an optimizer of
torch.optim, run eagerly. Where PyTorch offers a choice it has the faster one. Its parameters have the names of the
authors' checkpoints, so that the paper's `params_from_torch` gives our weights (and, being linear, our gradients); what
that leaves out is mapped in the file. A file has

    POINTS: dict[str, dict[str, Any]]        # what is compared -> arguments of `make`
    def make(torch, **settings) -> Rival: ...

and takes PyTorch as an argument: it can be imported without.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpapers.train import LossFn, create_state, jit_once, make_train_step

Arrays = Mapping[str, np.ndarray]
AGREEMENT = 1e-3  # float32, summed in another order through a few dozen layers; a wrong formula is off by far more


class Rival(NamedTuple):
    """Both sides of a comparison, with the same weights and batch.

    Attributes:
        ours: one update, in place of the last.
        theirs: likewise, PyTorch's.
        gradients: `() -> (ours, theirs)`, each (loss, gradients in our layout), with nothing dropped and with the
            batch's own statistics in BatchNorm.
        agreement: by how much a gradient may differ, of its norm.
    """

    ours: Callable[[], Any]
    theirs: Callable[[], float]
    gradients: Callable[[], tuple[tuple, tuple]]
    agreement: float


class Training:
    """A model in training as a callable without arguments: each call makes one update, in place of the last."""

    def __init__(self, loss: LossFn, optimizer: optax.GradientTransformation, params: Any, extra: Any, batch: Any):
        self.step = jax.jit(make_train_step(loss, optimizer), donate_argnums=0)
        # Donation frees the arrays given: keep the caller's.
        params, extra = jax.tree.map(jnp.copy, (params, extra))
        self.state = create_state(params, optimizer, extra)
        self.batch, self.key = batch, jax.random.key(0)

    def __call__(self) -> tuple[Any, Any]:
        """One update."""
        self.state, metrics = self.step(self.state, self.batch, self.key)
        return self.state, metrics


def pair(
    torch: Any,
    model: Any,
    their_loss: Callable[[], Any],
    their_optimizer: Any,
    convert: Callable[[Arrays], Any],
    our_loss: Callable[..., tuple],
    our_optimizer: optax.GradientTransformation,
    batch: Any,
    *,
    extra: Any = None,
    clip_norm: float | None = None,
    agreement: float = AGREEMENT,
) -> Rival:
    """The two sides of a comparison.

    Args:
        torch: the module.
        model: their module, with the weights of both.
        their_loss: of the model on the batch.
        their_optimizer: of the model's parameters.
        convert: their parameters by name -> ours.
        our_loss: as `make_train_step` takes it; with the key None nothing is dropped.
        our_optimizer: the same as theirs, with clipping.
        batch: for `our_loss`.
        extra: for `our_loss`.
        clip_norm: of their gradients.
        agreement: as of `Rival`.
    """

    def by_name(value: Callable[[Any], Any]) -> Any:
        # Copies: jax may take the memory of an array as it is, and PyTorch updates in place.
        arrays = {name: value(each).numpy().copy() for name, each in model.named_parameters()}
        return jax.tree.map(jnp.asarray, convert(arrays))

    params = by_name(lambda parameter: parameter.detach())
    our_gradient = jit_once(jax.value_and_grad(our_loss, has_aux=True))

    def backward() -> Any:
        their_optimizer.zero_grad()
        loss = their_loss()
        loss.backward()
        return loss

    def update() -> float:
        loss = backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        their_optimizer.step()
        return loss.item()

    def gradients() -> tuple[tuple, tuple]:
        (ours, _), slopes = our_gradient(params, extra, batch, None)
        model.eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.train()
        theirs = backward().item()
        model.train()
        return (ours, slopes), (theirs, by_name(lambda parameter: parameter.grad))

    return Rival(Training(our_loss, our_optimizer, params, extra, batch), update, gradients, agreement)
