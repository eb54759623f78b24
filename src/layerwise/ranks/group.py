"""`Ranks`: what the processes of a group say to each other, of few messages; nothing where there is one process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layerwise.errors import BadInput, RankFailed, RankLost

__all__ = [
    "Ranks",
    "check_same_model",
    "digest_of",
    "facts_of",
    "first_difference",
    "values_digest",
]

Result = TypeVar("Result")

_SIGNS = ("connection", "timed out", "timeout", "closed", "socket", "broken pipe")  # of a message that was not heard
_LARGE = 2**16  # numbers of a tensor that is worth a message of its own
_MOST = 7  # numbers of a vote
Group = Any  # torch.distributed.ProcessGroup, which some builds of torch do not have


class Ranks:
    """The processes of a group that train one model.

    group: a process group; None: all processes of the default one, or this process alone where
    `torch.distributed` was not started. Every method but `send` and `receive` is a collective: all ranks call it, in
    the same order. Where another rank is gone or gives no answer within the group's timeout, it raises RankLost.
    doing: what the ranks are at ("step 3"), for that message.

    A vote of a few numbers goes ahead of every message. A rank that has failed takes part in the next one by `tell`, so
    that the others raise RankFailed in place of waiting for it.
    """

    doing: str = ""

    def __init__(self, group: Group | None = None) -> None:
        self.group = group
        self._known: BaseException | None = None  # the last error of this rank that the others know
        started = dist.is_available() and dist.is_initialized()
        if group is not None and not started:
            raise BadInput("asked for the ranks of a process group, but torch.distributed is not initialized")
        self.size: int = dist.get_world_size(group) if started else 1
        self.rank: int = dist.get_rank(group) if started else 0
        if self.rank < 0:
            raise BadInput("this process is not in the process group that was given; make Ranks on its members alone")

    @classmethod
    def alone(cls) -> Ranks:
        """This process by itself, whatever groups there are."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.size, ranks.rank, ranks._known = None, 1, 0, None
        return ranks

    # -- failures ------------------------------------------------------------------------------------------------

    def tell(self, error: BaseException) -> None:
        """Make the others raise RankFailed at their next message, where they wait for this rank; else they do not know.

        Nothing is sent where all ranks know of the error, and no error is raised.
        """
        if self.size == 1 or error is self._known or isinstance(error, RankLost):
            return
        self._known = error
        with suppress(RankLost):
            self._vote(failed=True)
            self._texts(f"{type(error).__name__}: {str(error)[:500]}")

    def _ask(self, numbers: Sequence[float] = ()) -> list[float]:
        """The largest of each number over ranks. Raises RankFailed where another rank has failed before."""
        found = self._vote(numbers)
        if found[0]:
            texts = [
                f"rank {rank} failed with {text}" for rank, text in enumerate(self._texts(None)) if text is not None
            ]
            self._known = RankFailed(f"{'; '.join(texts)}. This rank, {self.rank}, has stopped with it")
            raise self._known
        return found[1 : 1 + len(numbers)]

    def _vote(self, numbers: Sequence[float] = (), failed: bool = False) -> list[float]:
        assert len(numbers) <= _MOST
        said = [float(failed), *numbers, *[0.0] * (_MOST - len(numbers))]
        message = torch.tensor(said, dtype=torch.float64, device=self._place)
        with self._delivery():
            dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.group)
        found: list[float] = message.tolist()
        return found

    def _texts(self, text: str | None) -> list[str | None]:
        found: list[str | None] = [None] * self.size
        with self._delivery():
            dist.all_gather_object(found, text, group=self.group)
        return found

    @property
    def _place(self) -> torch.device:
        """Where votes live: on the CPU, unless the group has messages on GPUs alone."""
        if "cpu" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.device(torch.accelerator.current_device_index())

    # -- messages ------------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in the order of the ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._ask()
        with self._delivery():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks, of tensors that have the same shapes on all; one message for each dtype and device."""
        if self.size == 1:
            return list(tensors)
        out: list[Tensor | None] = [None] * len(tensors)
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, t in enumerate(tensors):
            kinds.setdefault((t.dtype, t.device), []).append(i)
        flats = [torch.cat([tensors[i].detach().reshape(-1) for i in members]) for members in kinds.values()]
        self._ask()
        for members, flat in zip(kinds.values(), flats, strict=True):
            with self._delivery():
                dist.all_reduce(flat, group=self.group)
            parts = flat.split([tensors[i].numel() for i in members])
            for i, part in zip(members, parts, strict=True):
                out[i] = part.view(tensors[i].shape)
        return [t for t in out if t is not None]

    def send_from(self, source: int, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of one rank: small ones in one message for each dtype and device."""
        self.broadcast_owned([(source, tensors)])

    def broadcast_owned(self, owned: Sequence[tuple[int, Sequence[Tensor]]]) -> None:
        """Overwrite tensors with those of their owners, given by rank: one broadcast for each owner that has any."""
        if self.size == 1:
            return
        sent = []
        for rank in range(self.size):
            kinds: dict[Any, list[Tensor]] = {}
            for t in (t for owner, held in owned if owner == rank for t in held):
                # large ones as they lie, without a copy where they are contiguous
                kinds.setdefault(id(t) if t.numel() >= _LARGE else (t.dtype, t.device), []).append(t)
            for members in kinds.values():
                whole = len(members) == 1
                flat = members[0].detach() if whole else torch.cat([t.detach().reshape(-1) for t in members])
                sent.append((rank, flat.contiguous(), members))
        if not sent:
            return
        self._ask()
        with self._delivery():
            for work in [
                dist.broadcast(flat, group=self.group, group_src=rank, async_op=True) for rank, flat, _ in sent
            ]:
                work.wait()
        with torch.no_grad():
            for rank, flat, members in sent:
                if rank != self.rank and not (len(members) == 1 and members[0].is_contiguous()):
                    for t, part in zip(members, flat.reshape(-1).split([t.numel() for t in members]), strict=True):
                        t.copy_(part.view(t.shape))

    def send(self, to: int, tensors: Sequence[Tensor]) -> None:
        """Send tensors to one rank, which receives them."""
        for t in tensors:
            with self._delivery():
                dist.send(t.detach().contiguous(), group=self.group, group_dst=to)

    def receive(self, source: int, tensors: Sequence[Tensor]) -> None:
        """Overwrite contiguous tensors with those that one rank sends."""
        for t in tensors:
            with self._delivery():
                dist.recv(t, group=self.group, group_src=source)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self.most([float(flag)])[0] > 0

    def most(self, numbers: Sequence[float]) -> list[float]:
        """The largest over ranks of each of up to seven numbers (no NaN), in double precision."""
        return list(numbers) if self.size == 1 else self._ask(numbers)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise BadInput on all ranks, by name, where a fact is missing on a rank or its text differs."""
        mine = {name: repr(fact) for name, fact in facts.items()}
        if len(set(self.gather(digest_of(mine)))) == 1:
            return
        found = first_difference(self.gather(mine), "nothing of that name")
        if found is not None:
            raise BadInput(
                f"the ranks disagree on {found[0]!r}: {found[1]}. Every rank must build the same model with the same "
                "settings"
            )

    def attempt(
        self, run: Callable[[], Result]
    ) -> tuple[Result | None, Exception | None, list[tuple[str, str] | None]]:
        """What `run` gives here, or its error; and every rank's error by type and text, nothing where all is well."""
        result, failure = None, None
        try:
            result = run()
        except Exception as error:
            failure = error
        if not self.any(failure is not None):
            return result, None, []
        return result, failure, self.gather(None if failure is None else (type(failure).__name__, str(failure)))

    def together(self, run: Callable[[], Result]) -> Result:
        """What `run` gives here, once all ranks have run it; where it raises, all ranks raise.

        That rank raises its own error, the others RankFailed with its text, so that none waits for it. `run` must not
        wait for other ranks itself.
        """
        if self.size == 1:
            return run()
        result, failure, said = self.attempt(run)
        self._known = failure
        if failure is not None:
            raise failure
        failed = {rank: ": ".join(text) for rank, text in enumerate(said) if text is not None}
        if failed:
            texts = "; ".join(f"rank {rank} failed with {text}" for rank, text in failed.items())
            self._known = RankFailed(f"{texts}. This rank, {self.rank}, has stopped with it")
            raise self._known
        return result  # type: ignore[return-value]

    def first(self, text: str | None) -> str | None:
        """The text of the first rank that has one."""
        if not self.any(text is not None):
            return None
        return next(found for found in self.gather(text) if found is not None)

    @contextmanager
    def _delivery(self) -> Iterator[None]:
        """Around a message: RankLost where it did not arrive."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(sign in str(error).lower() for sign in _SIGNS):
                raise
            at = f" at {self.doing}" if self.doing else ""
            raise RankLost(
                f"rank {self.rank} of {self.size} heard nothing from another rank{at}: that one ended, was killed, or "
                f"is busy for longer than the group's timeout ({str(error).strip().splitlines()[0]}). Start the run "
                "again from its last checkpoint; `torchrun --max-restarts` does so by itself"
            ) from error


def check_same_model(model: nn.Module | Mapping[str, Tensor], group: Group | None = None) -> None:
    """Raise BadInput on all ranks, by name, where they disagree on the parameters of a model.

    Compared are their names and order, shapes, types and `requires_grad`, by one message of a digest each. The numbers
    are not. A collective: all ranks of the group call it. Nothing is sent where there is one process.
    """
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    Ranks(group).agree(facts_of(named) | {"the order of the parameters": list(named)})


def facts_of(named: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the ranks' parameters must have in common besides their values, by name: shape, type, and if they train."""
    return {
        name: (tuple(p.shape), str(p.dtype), "trained" if p.requires_grad else "frozen") for name, p in named.items()
    }


def values_digest(t: Tensor) -> str:
    """A text that differs where the bits of two tensors do."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def digest_of(facts: Mapping[str, str]) -> str:
    """A short text that differs where the facts do, in whatever order they are given."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()


def first_difference(
    said: Sequence[Mapping[str, str]], missing: str | None = None, length: int | None = None
) -> tuple[str, str] | None:
    """The first name of which ranks say different things, and what each says; None where there is none.

    missing: what a rank says that does not have the name; None: nothing that would differ. length: of what is repeated.
    """
    for name in dict.fromkeys(name for one in said for name in one):
        each = {rank: one.get(name, missing) for rank, one in enumerate(said)}
        texts = {rank: text for rank, text in each.items() if text is not None}
        if len(set(texts.values())) > 1:
            return name, "; ".join(f"rank {rank}: {text[:length]}" for rank, text in texts.items())
    return None
