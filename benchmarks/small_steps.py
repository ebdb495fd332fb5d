"""Time of whole training steps of small networks: stock's norms, ours in two forms, and no norm at all."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm

from . import goals, small_networks
from .handwritten import BatchRenorm1d, GhostBatchNorm1d
from .interleaved import clocked, interleave, medians, ratio, repeated
from .layer_page import ratio_of, rival
from .progress import progress
from .small_networks import ActorCritic, Norm, TabNet
from .step_time import losses_differ
from .tables import Row, Rows, table_of
from .unchecked import Unchecked

Step = Callable[[], float]  # returns its loss
Train = Callable[[nn.Module, int], Step]  # takes a network and a batch size

ROUNDS, QUICK_ROUNDS = 151, 3
SECONDS = 1e-2  # a round repeats a step for about as long
THREADS = (1, 2)
# A network that has learned its one batch by heart computes with denormal numbers, which are slow; at this
# rate it stays what it was, and a step costs what it does at any rate.
_RATE = 1e-7


def _step(model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _classify(model: nn.Module, batch: int, shape: tuple[int, ...], classes: int) -> Step:
    x, labels = torch.randn(batch, *shape), torch.randint(classes, (batch,))
    return _step(model, lambda: F.cross_entropy(model(x), labels))


def _regress(model: nn.Module, batch: int, inputs: int) -> Step:
    x, target = torch.randn(batch, inputs), torch.randn(batch, 1)
    return _step(model, lambda: F.mse_loss(model(x), target))


def _train_actor_critic(model: nn.Module, batch: int) -> Step:
    """Return a step of CrossQ: of the critics, without target networks, then of the actor."""
    assert isinstance(model, ActorCritic)
    state, next_state = torch.randn(2, batch, ActorCritic.STATE)
    action, noise, next_noise = torch.randn(3, batch, ActorCritic.ACTION)
    reward = torch.randn(batch, 1)
    discount, temperature = 0.99, 0.1

    def critic_loss() -> Tensor:
        model.actor.eval()
        with torch.no_grad():
            next_action, density = model.act(next_state, next_noise)
        model.actor.train()
        both = torch.cat((torch.cat((state, action), 1), torch.cat((next_state, next_action), 1)))
        values = [one(both).chunk(2) for one in model.critics]
        least = torch.minimum(*(following for _, following in values))
        target = (reward + discount * (least - temperature * density)).detach()
        return sum((F.mse_loss(value, target) for value, _ in values), torch.zeros(()))

    def actor_loss() -> Tensor:
        new_action, density = model.act(state, noise)
        model.critics.eval()
        value = model.least_value(state, new_action)
        model.critics.train()
        return (temperature * density - value).mean()

    critics_step, actor_step = _step(model.critics, critic_loss), _step(model.actor, actor_loss)

    def step() -> float:
        loss = critics_step()
        actor_step()
        model.critics.zero_grad()  # of the actor's loss
        return loss

    return step


@dataclass(frozen=True)
class Network:
    """A small network and how it is trained.

    Attributes:
        build: makes it, given its norms.
        batch: samples of a step.
        train: makes its training step.
        stock: makes the norms that ours are compared with: torch's, or those that are written by hand.
        ours: makes ours.
        fuses: whether an activation follows a norm.
    """

    build: Callable[[Norm], nn.Module]
    batch: int
    train: Train
    stock: Callable[[int], nn.Module]
    ours: Callable[[int], nn.Module]
    fuses: bool


_image = functools.partial(_classify, shape=(784,), classes=10)
_NORM_1D = (nn.BatchNorm1d, batchnorm.BatchNorm1d)
_GHOST = functools.partial(batchnorm.BatchNorm1d, momentum=0.01, statistics=batchnorm.Ghost(128))
_RENORM = functools.partial(
    batchnorm.BatchNorm1d,
    eps=1e-3,
    momentum=0.01,
    statistics=batchnorm.Renorm(r_steps=(0, 0), d_steps=(0, 0)),
)
NETWORKS = {
    "MLP": Network(small_networks.mlp, 32, _image, *_NORM_1D, fuses=False),
    "deep": Network(small_networks.deep, 32, _image, *_NORM_1D, fuses=True),
    "critic": Network(
        small_networks.critic, 256, functools.partial(_regress, inputs=24), *_NORM_1D, fuses=True
    ),
    "conv net": Network(
        small_networks.conv_net,
        32,
        functools.partial(_classify, shape=(1, 28, 28), classes=10),
        nn.BatchNorm2d,
        batchnorm.BatchNorm2d,
        fuses=True,
    ),
    "TabNet, Ghost(128)": Network(
        TabNet,
        1024,
        functools.partial(_classify, shape=(TabNet.FEATURES,), classes=TabNet.CLASSES),
        GhostBatchNorm1d,
        _GHOST,
        fuses=False,
    ),
    "actor–critic, Renorm()": Network(
        ActorCritic, 256, _train_actor_critic, BatchRenorm1d, _RENORM, fuses=False
    ),
}
FORMS = ("stock", "drop-in", "fused", "unchecked", "no norm")


def measure(quick: bool = False) -> Rows:
    """Return a row per number of threads and network: medians in seconds, and ratios to stock's step."""
    names = list(NETWORKS)[:1] if quick else list(NETWORKS)
    cases = [(name, threads) for threads in THREADS for name in names]
    return [measured(*case, quick=quick) for case in progress(cases, "small training steps")]


def measured(name: str, threads: int, *, quick: bool = False) -> Row:
    """Return a network's row, measured with `threads` threads of torch."""
    network = NETWORKS[name]
    with _torch_threads(threads):
        steps = training_steps(network)
        losses = {form: step() for form, step in steps.items()}
        difference = losses_differ(name, {form: loss for form, loss in losses.items() if form != "no norm"})
        repeats = 1 if quick else max(1, round(SECONDS / min(clocked(steps["stock"])() for _ in range(5))))
        clocks = {form: clocked(repeated(step, repeats)) for form, step in steps.items()}
        times = interleave(clocks, QUICK_ROUNDS if quick else ROUNDS)
    return {
        "network": name,
        "batch": network.batch,
        "threads": threads,
        "seconds": {form: median / repeats for form, median in medians(times).items()},
        "ratios": {
            f"stock / {form}": ratio(times["stock"], taken)
            for form, taken in times.items()
            if form != "stock"
        },
        "losses_differ": difference,
    }


def training_steps(network: Network) -> dict[str, Step]:
    """Return the training step of each form of a network, from the same weights and on the same numbers."""
    found = {}
    for form in FORMS:
        if (form == "fused" and not network.fuses) or (
            form == "unchecked" and network.stock is not _NORM_1D[0]
        ):
            continue
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = network.build(_norm(network, form))
            if form == "fused":
                batchnorm.fuse(model)
            torch.manual_seed(1)
            found[form] = network.train(model, network.batch)
    return found


def _norm(network: Network, form: str) -> Norm:
    if form == "no norm":
        return lambda _: None
    return {"stock": network.stock, "unchecked": Unchecked}.get(form, network.ours)


@contextlib.contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def goals_table(rows: Rows) -> str:
    """The goals of small networks, and what was found."""
    return goals.findings_table(goals.small_step_findings(rows))


def small_step_table(rows: Rows) -> str:
    """Milliseconds of each form's step, and stock's as a multiple of the others'."""
    ratios = [f"stock / {form}" for form in FORMS[1:]]
    return table_of(
        {"network": row["network"], "batch": str(row["batch"]), "threads": str(row["threads"])}
        | {
            f"{form}, ms": f"{row['seconds'][form] * 1e3:.2f}" if form in row["seconds"] else ""
            for form in FORMS
        }
        | {rival(name): ratio_of(row, name) for name in ratios}
        for row in rows
    )
