"""FP32 master weights: who has one, and how an inner optimizer comes to step over them.

A 16-bit weight loses an update smaller than half its last place; a float32 master keeps it
(Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.1).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import SIXTEEN_BIT, writes_to
from mpcore.masters.held_masters import HeldMasters
from mpcore.masters.held_moments import HeldMoments
from mpcore.masters.inner_guards import check_shared_groups
from mpcore.masters.kept_masters import KeptMasters
from mpcore.masters.shared import NEVER, SUSPECT, Sharing
from mpcore.masters.shown_state import ShownState
from mpcore.masters.swapped_groups import swapped
from mpcore.masters.upcast import upcast

Groups = list[dict[str, Any]]


class Masters(KeptMasters):
    """The FP32 masters of 16-bit parameters, and the optimizer state that goes with them.

    The inner optimizer keeps its own state under the master, a key of the model's parameter in
    `outer_state` shows the same tensors plus the master, as it lies in memory.

    Args:
        inner: The wrapped optimizer.
        outer_state: The wrapper's `state`, keyed by the model's parameters.
        held: How they lie in memory.
        moments: How moments do.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        outer_state: dict[Tensor, Any],
        held: HeldMasters,
        moments: HeldMoments,
    ) -> None:
        super().__init__(held, moments)
        self._inner = inner
        self._shared_groups = inner.param_groups
        self._inner_state = inner.state
        self._outer_state = outer_state
        self._shown = ShownState()
        self.link_state(param for group in inner.param_groups for param in group["params"])

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
        state = self._inner.state.get(param)
        moved = self.held.parts(state) if isinstance(state, dict) else {}
        if shared is not None:  # which may be older than what was written through `.data`
            master = self.held.share(param, self.sharing.held_by_others(param, self.held.store))
        else:
            master = self.held.begin(param, moved if value is None else {}, value)
        is_new = shared is None and not any(master is part for part in moved.values())
        self._master_of[param] = master
        self._place[id(param)] = len(self._place)
        self._seen += writes_to([param]) if is_new else [SUSPECT]
        self._hold(param, master)
        self.version += 1
        if param in self._inner.state:
            state = self._inner.state.pop(param)
            self._inner.state[master] = upcast(self.held.without_parts(state))
        shown = self.held.shown(param, master)
        self._outer_state[param] = {**shown, **self._inner.state.get(master, {})}
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
                shown = {**self.held.shown(param, master), **inner_state.get(master, {})}
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
        if not (groups is self._shared_groups is self._inner.param_groups):
            check_shared_groups(self._shared_groups, groups, self._groups)
        self._outer_state = shown
        if self._inner.state is not self._inner_state:
            self._take_inner_state()
        if self.sharing.links and not self._shown.is_changed(shown):
            self.link_state(list(self.sharing.links))  # another optimizer may have packed them

    def take_over_values(self) -> None:
        """Takes over values that somebody put into the wrapper's state, or took out; no sync."""
        shown = self._outer_state
        if self._shown.is_changed(shown):
            self.held.check_shown(shown, self._master_of.items())
            self._shown.take_over(shown, self._inner.state, self._master_of, self.held.take)
            self._let_go(shown)
            self._keep_shared()
            self.version += 1
            self.link_state([*self._master_of])

    def _take_inner_state(self) -> None:
        """Goes on from a state that somebody put in the place of the inner optimizer's."""
        state = self._inner_state = self._inner.state
        for param, master in self._master_of.items():
            if param in state:
                state[master] = upcast(self.held.without_parts(state.pop(param)))
        self._outer_state.clear()
        self.version += 1
        self.link_state([*self._master_of, *(p for g in self._groups for p in g["params"])])

    def _let_go(self, shown: dict[Tensor, Any]) -> None:
        """Drops masters of parameters that are in no group and no state any more."""
        known = {*shown, *(p for group in self._inner.param_groups for p in group["params"])}
        gone = [param for param in self._master_of if param not in known]
        if not gone:
            return
        seen = dict(zip(self._master_of, self._seen, strict=True))
        for param in gone:
            del self._master_of[param]
            self.held.forget(param)
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
            self.held.share(param, link.held)
            self.held.overwrite(param, shared, {"master": new})
            if new in self._inner.state:
                self._inner.state[shared] = self._inner.state.pop(new)
            self._master_of[param] = shared
        for param, master in self._master_of.items():
            self._hold(param, master)

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
                self._hold(param, master)

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
        self.held.clear()
        self._fitted.forget()
        self._inner.state.clear()
        self._outer_state.clear()
        for param, state in states.items():
            if not isinstance(param, Tensor):
                self._inner.state[param] = state
                continue
            rest, parts = self.held.without_parts(state), self.held.parts(state)
            if parts:
                self._master_of[param] = self._resumed(param, parts)
                self._place[id(param)] = len(self._place)
                self._hold(param, self._master_of[param])
                self.sharing.note_loaded(param)
            if rest:
                self._inner.state[self.of(param)] = rest
        # the weights that go with these masters are still to come, or there
        self._seen = [NEVER] * len(self._place)
        self.link_state(key for key in states if isinstance(key, Tensor))

    def is_compact(self, param: Tensor) -> bool:
        """Whether a master or a moment of `param` may not lie in memory as float32."""
        packed = param in self._master_of and not self.held.is_whole(param)
        return packed or (self.moments.are_compact and param in self._outer_state)

    def float32_state(self, param: Tensor) -> dict[str, Any]:
        """Returns the state of `param` in float32, "master" first if there is one; no copies."""
        master = self._master_of.get(param)
        if master is None:
            return self.moments.decoded(self._outer_state.get(param, {}))
        value = self.held.value_of(param, master)
        return {"master": value, **self.moments.decoded(self._inner.state.get(master, {}))}

    def _resumed(self, param: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Returns a master that was loaded, which one that others hold becomes."""
        if self.sharing.others(param) is None:
            return self.held.resume(param, parts)
        shared = self.held.share(param, self.sharing.held_by_others(param, self.held.store))
        self.held.overwrite(param, shared, parts)
        return shared

    def pack(self, saturated: Tensor) -> None:
        """Encodes masters that came in float32, and weights with them; no host sync."""
        if self.held.pack(self._master_of.items(), saturated):
            self.note_weights()
            self.note_packed(self._master_of)

    def note_packed(self, params: Iterable[Tensor]) -> None:
        """Notes that these masters lie in other tensors now, unless they are whole still."""
        packed = [param for param in params if not self.held.is_whole(param)]
        if packed:
            self.version += 1
            self.link_state(packed)

    @contextmanager
    def decoded(self, params: Iterable[Tensor] | None = None) -> Iterator[None]:
        """Has the values of masters in memory: 4 bytes a parameter more where they are packed.

        `write_weights` keeps what is made of them.

        Args:
            params: Whose masters; all by default.
        """
        pairs = self.items() if params is None else [(p, self._master_of[p]) for p in params]
        self.held.decode(pairs)
        try:
            yield
        finally:
            self.held.release(self.items() if params is None else pairs)

    def write_weights(
        self,
        backend: Backend,
        found_inf: Tensor,
        saturated: Tensor,
        params: Sequence[Tensor] | None = None,
    ) -> None:
        """Rounds every master into its weight unless `found_inf` is set; no host sync.

        Args:
            backend: Rounds.
            found_inf: 0-d, non-zero: do not.
            saturated: 0-d int64, counts weights clamped to the finite maximum.
            params: Whose masters; all by default.
        """
        pairs = self.items() if params is None else [(p, self._master_of[p]) for p in params]
        self.held.write(pairs, backend, found_inf, saturated)
        if params is None:
            self.note_weights()
        else:
            self.note(params)

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
    def fused_only(self) -> str | None:
        """What of it fused updates alone know, as it was asked for; None: nothing."""
        if self.held.store == "none":
            return 'masters="none"'
        return f'moments="{self.moments.kept}"' if self.moments.are_compact else None

    def numbers(self) -> dict[Tensor, int]:
        """Returns the place of each parameter in the param groups."""
        return {p: n for n, p in enumerate(p for group in self._groups for p in group["params"])}

    @property
    def _groups(self) -> Groups:
        return self._inner.param_groups
