"""FP32 master weights: who has one, and how an inner optimizer comes to step over them.

A 16-bit weight loses an update smaller than half its last place; a float32 master keeps it
(Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.1).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mpcore.base import SIXTEEN_BIT, any_dtensor, map_tensors, writes_to
from mpcore.masters.fitted import FittedMasters
from mpcore.masters.inner_guards import check_shared_groups
from mpcore.masters.shared import NEVER, SUSPECT, Sharing
from mpcore.masters.shown_state import ShownState
from mpcore.masters.swapped_groups import swapped

Groups = list[dict[str, Any]]


def upcast(value: Any) -> Any:
    """Returns optimizer state with every 16-bit tensor in it as float32; the rest as it is."""
    return map_tensors(value, lambda t: t.float() if t.dtype in SIXTEEN_BIT else t)


class Masters:
    """The FP32 masters of 16-bit parameters, and the optimizer state that goes with them.

    The inner optimizer keeps its own state under the master, a key of the model's parameter in
    `outer_state` shows the same tensors plus `"master"`.

    Args:
        inner: The wrapped optimizer.
        outer_state: The wrapper's `state`, keyed by the model's parameters.
    """

    def __init__(self, inner: torch.optim.Optimizer, outer_state: dict[Tensor, Any]) -> None:
        self._inner = inner
        self._shared_groups = inner.param_groups
        self._inner_state = inner.state
        self._outer_state = outer_state
        self._master_of: dict[Tensor, Tensor] = {}
        #: by id of the key, which keeps it valid: its place in the order of creation
        self._place: dict[int, int] = {}
        #: in that order, the writes that a weight had when its master fitted; NEVER, SUSPECT
        self._seen: list[int] = []
        self._shown = ShownState()
        self.sharing = Sharing()
        #: counts what replaces tensors: plans made of older ones are stale
        self.version = 0
        self._fitted = FittedMasters()
        self._sharded = (-1, False)  # what `any_sharded` was at a version
        self.link_state(param for group in inner.param_groups for param in group["params"])

    def of(self, param: Tensor) -> Tensor:
        """Returns the master of `param`, or `param` itself if it has none."""
        return self._master_of.get(param, param)

    def __len__(self) -> int:
        return len(self._master_of)

    @property
    def any_sharded(self) -> bool:
        """Whether a weight is a DTensor: writes to what this rank holds of it nobody counts."""
        version, sharded = self._sharded
        if version != self.version:
            sharded = any_dtensor(self._master_of)
            self._sharded = self.version, sharded
        return sharded

    def place_of(self, param: Tensor) -> int:
        """Returns which one in the order of creation the master of `param` is."""
        return self._place[id(param)]

    def items(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Returns (parameter, master) pairs in order of creation."""
        return self._master_of.items()

    def create(self, param: Tensor, value: Tensor | None = None) -> None:
        """Makes `param`'s master; no host sync. Does nothing if it has one.

        Args:
            param: A float16 or bfloat16 parameter.
            value: float32 tensor that becomes the master, not copied. By default the weight. Not
                used if another optimizer holds a master of the parameter: that is shared.
        """
        if param in self._master_of:
            return
        shared = self.sharing.others(param)
        moved = self._moved_here(param)
        if shared is not None:
            master = shared  # which may be older than what was written through `.data`
        elif value is None and moved is not None:
            master = moved
        else:
            master = param.detach().float() if value is None else value.detach()
        self._master_of[param] = master
        self._place[id(param)] = len(self._place)
        self._seen += [SUSPECT] if master is shared or master is moved else writes_to([param])
        self.sharing.hold(param, master)
        self.version += 1
        if param in self._inner.state:
            self._inner.state[master] = upcast(self._inner.state.pop(param))
        self._outer_state[param] = {"master": master, **self._inner.state.get(master, {})}
        self._shown.note_one()

    def create_for(self, params: Iterable[Tensor]) -> None:
        """Makes the masters of the 16-bit ones among `params` that have none; no host sync."""
        params, known = list(params), self._place  # by identity: hashing a tensor takes longer
        if not all(map(known.__contains__, map(id, params))):
            for param in params:
                if id(param) not in known and param.dtype in SIXTEEN_BIT:
                    self.create(param)
        self._shown.settle(self._outer_state)

    def create_for_step(self, params: Sequence[Tensor]) -> None:
        """Makes the masters of `params`, in order, and of all others in groups; no host sync.

        Some optimizers move parameters that have no gradient in a step.
        """
        self.create_for(params)
        if len(params) != sum(len(group["params"]) for group in self._groups):
            every = [param for group in self._groups for param in group["params"]]
            self.create_for(param for param in every if param.requires_grad)

    def link_state(self, params: Iterable[Tensor]) -> None:
        """Shows the inner optimizer's state of `params` in the outer state; no host sync."""
        inner_state = self._inner.state
        for param in params:
            master = self._master_of.get(param)
            if master is not None:
                shown = {"master": master, **inner_state.get(master, {})}
                self._outer_state.setdefault(param, {}).clear()
                self._outer_state[param].update(shown)
            elif param in inner_state:
                self._outer_state[param] = inner_state[param]
        for key, value in inner_state.items():
            if not isinstance(key, Tensor):  # what belongs to no parameter
                self._outer_state[key] = value
        self._shown.note(self._outer_state)

    def take_over_edits(self, shown: dict[Tensor, Any], groups: Groups) -> None:
        """Hands what somebody put into the wrapper's state, or took out, to the inner; no sync.

        Args:
            shown: The wrapper's state; another dictionary than before if somebody replaced it.
            groups: The wrapper's param groups.

        Raises:
            StageError: The list of groups is no longer the one that both share.
        """
        self.follow(shown, groups)
        self.take_over_values()

    def follow(self, shown: dict[Tensor, Any], groups: Groups) -> None:
        """Goes on from other dictionaries that somebody put in place; no look at values.

        Args:
            shown: As for `take_over_edits`.
            groups: Likewise.

        Raises:
            StageError: Likewise.
        """
        check_shared_groups(self._shared_groups, groups, self._groups)
        self._outer_state = shown
        if self._inner.state is not self._inner_state:
            self._take_inner_state()

    def take_over_values(self) -> None:
        """Takes over values that somebody put into the wrapper's state, or took out; no sync."""
        shown = self._outer_state
        if self._shown.is_changed(shown):
            self._shown.take_over(shown, self._inner.state, self._master_of)
            self._let_go(shown)
            self._keep_shared()
            self.version += 1
            self.link_state([*self._master_of])

    def _take_inner_state(self) -> None:
        """Goes on from a state that somebody put in the place of the inner optimizer's."""
        state = self._inner_state = self._inner.state
        for param, master in self._master_of.items():
            if param in state:
                entry = upcast(state.pop(param))
                state[master] = {key: value for key, value in entry.items() if key != "master"}
        self._outer_state.clear()
        self.version += 1
        self.link_state([*self._master_of, *(p for g in self._groups for p in g["params"])])

    def _moved_here(self, param: Tensor) -> Tensor | None:
        """Takes out the master in a state that was moved to a parameter, if it fits that one."""
        state = self._inner.state.get(param)
        if not isinstance(state, dict) or "master" not in state:
            return None
        rest = {key: value for key, value in state.items() if key != "master"}
        self._inner.state[param] = rest
        master: Any = state["master"]
        fits = isinstance(master, Tensor) and master.dtype == torch.float32
        return master if fits and master.shape == param.shape else None

    def _let_go(self, shown: dict[Tensor, Any]) -> None:
        """Drops masters of parameters that are in no group and no state any more."""
        known = {*shown, *(p for group in self._inner.param_groups for p in group["params"])}
        gone = [param for param in self._master_of if param not in known]
        if not gone:
            return
        seen = dict(zip(self._master_of, self._seen, strict=True))
        for param in gone:
            del self._master_of[param]
            self.sharing.links.pop(param, None)
        self._seen = [seen[param] for param in self._master_of]
        self._place = {id(param): place for place, param in enumerate(self._master_of)}

    @torch.no_grad()
    def _keep_shared(self) -> None:
        """Gives the value of a master that was replaced to the one that others hold as well."""
        for param, link in self.sharing.links.items():
            new, shared = self._master_of.get(param), link.master
            if new is None or shared is None or new is shared:
                continue
            shared.copy_(new)
            if new in self._inner.state:
                self._inner.state[shared] = self._inner.state.pop(new)
            self._master_of[param] = shared
        for param, master in self._master_of.items():
            self.sharing.hold(param, master)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "sharing"}

    def after_copy(self) -> None:
        """Sets right what a copy or a pickle has taken from its original: identities."""
        self._place = {id(param): place for place, param in enumerate(self._master_of)}
        self._fitted.forget()
        # a copy counts its writes anew, and may be of a weight that somebody has written to
        self._seen = [then if then == NEVER else SUSPECT for then in self._seen]
        self._shown.note(self._outer_state)
        self.sharing = Sharing()
        for param, master in self._master_of.items():
            held = self.sharing.others(param)
            if held is None or held is master:
                self.sharing.hold(param, master)

    @torch.no_grad()
    def replace_state(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Makes `states` the whole optimizer state, masters included.

        Args:
            states: Per parameter what `outer_state` shows of it. Tensors are taken, not copied,
                but for masters that other optimizers hold: these get the values.
        """
        self.version += 1
        self._master_of.clear()
        self._place.clear()
        self._fitted.forget()
        self._inner.state.clear()
        self._outer_state.clear()
        for param, state in states.items():
            if not isinstance(param, Tensor):
                self._inner.state[param] = state
                continue
            rest = {key: value for key, value in state.items() if key != "master"}
            if "master" in state:
                shared = self.sharing.others(param)
                master = state["master"] if shared is None else shared.copy_(state["master"])
                self._master_of[param] = master
                self._place[id(param)] = len(self._place)
                self.sharing.hold(param, master)
                self.sharing.note_loaded(param)
            if rest:
                self._inner.state[self.of(param)] = rest
        # the weights that go with these masters are still to come, or there
        self._seen = [NEVER] * len(self._place)
        self.link_state(key for key in states if isinstance(key, Tensor))

    def note_weights(self) -> None:
        """Notes that all weights are their rounded masters now; no host sync."""
        self._seen = writes_to(self._master_of)
        if self.sharing.links:
            self.sharing.note()
        if self.any_sharded:
            self._fitted.note(self._master_of.items())

    def edited(self) -> list[Tensor]:
        """Returns sharded parameters whose masters somebody wrote to, or replaced; no host sync."""
        return self._fitted.edited(self._master_of.items()) if self.any_sharded else []

    def written(self) -> list[Tensor]:
        """Returns the weights that somebody wrote to since their masters fitted; no host sync.

        What bumps no version counter (`.data`, NumPy) is not seen.
        """
        writes = writes_to(self._master_of)
        if writes == self._seen and not self.sharing.links:
            return []
        counted = zip(self._master_of, writes, self._seen, strict=True)
        moved = [(param, then) for param, now, then in counted if now != then]
        if not self.sharing.links:
            return [param for param, _ in moved]
        mine = [p for p, then in moved if then in (NEVER, SUSPECT) or not self.sharing.is_fit(p)]
        return list(dict.fromkeys([*mine, *self.sharing.suspects(NEVER, SUSPECT)]))

    def never_fitted(self) -> list[Tensor]:
        """Returns the weights of which nobody knows whether they go with their masters."""
        if NEVER not in self._seen:
            return self.sharing.suspects(NEVER)
        mine = [p for p, then in zip(self._master_of, self._seen, strict=True) if then == NEVER]
        return list(dict.fromkeys([*mine, *self.sharing.suspects(NEVER)]))

    def note(self, params: Iterable[Tensor]) -> None:
        """Notes that these weights are their rounded masters now; no host sync."""
        params = list(params)
        for param, writes in zip(params, writes_to(params), strict=True):
            self._seen[self._place[id(param)]] = writes
        self.sharing.note(params)
        if self.any_sharded:
            self._fitted.note((param, self.of(param)) for param in params)

    def suspect(self, params: Iterable[Tensor]) -> None:
        """Notes that these weights are not their rounded masters: they are `written`."""
        for param in params:
            self._seen[self._place[id(param)]] = SUSPECT
            self.sharing.doubt(param)

    def in_groups(self, numbers: Collection[int] | None = None) -> AbstractContextManager[None]:
        """Puts masters into the inner optimizer's groups, or those of `numbers`; empties others."""
        contents = (
            [self.of(p) for p in g["params"]] if numbers is None or number in numbers else []
            for number, g in enumerate(self._groups)
        )
        return swapped(self._groups, contents)

    def out_of_groups(self) -> AbstractContextManager[None]:
        """Within `in_groups`, puts the model's parameters back: for a user's closure."""
        param_of = {master: param for param, master in self._master_of.items()}
        contents = ([param_of.get(m, m) for m in g["params"]] for g in self._groups)
        return swapped(self._groups, contents)

    @property
    def _groups(self) -> Groups:
        return self._inner.param_groups
