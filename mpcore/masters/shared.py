"""One master for a parameter that several optimizers step: who holds it, and since when it fits.

A parameter carries a link to its master, as an attribute: it is the one object that two optimizers
have in common which know nothing of each other. The link keeps nothing alive: when the last
optimizer that holds the master is gone, so is the master. A deep copy of the parameter has no link;
a pickle has an empty `OrderedDict` in its place, so that it loads without mpcore.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mpcore.base import held_here, writes_to
from mpcore.errors import ArgumentError

#: The attribute of a parameter.
LINK = "_mpcore_master"

#: In the place of a number of writes (-1: nobody counts them): the master came without its weight,
NEVER = -2
#: and nobody knows whether the weight is its rounded master.
SUSPECT = -3


class MasterLink:
    """What a parameter knows of its master.

    Args:
        master: The float32 tensor by which optimizers know it.
        held: What those hold that have it: see `HeldMasters.shared`.
        store: How it lies in memory.

    Attributes:
        holders: The optimizers that hold it.
        loaded: Those that have loaded it, until all have or one of several has taken a step.
        fits_since: How often the parameter had been written to when it was its rounded master last,
            if several hold that; NEVER, SUSPECT.
    """

    def __init__(self, master: Tensor, held: Any, store: str) -> None:
        self.holders: weakref.WeakSet[Sharing] = weakref.WeakSet()
        self.loaded: weakref.WeakSet[Sharing] = weakref.WeakSet()
        self.fits_since = SUSPECT
        self.store = store
        self._master = weakref.ref(master)
        self._held = weakref.ref(held)

    @property
    def master(self) -> Tensor | None:
        """The master, None if no optimizer holds it any more."""
        return self._master() if self.holders else None

    @property
    def held(self) -> Any:
        """What its holders hold; None as `master` is."""
        return self._held() if self.holders else None

    def __reduce__(self) -> Any:
        return OrderedDict, ()


class Sharing:
    """The masters that one optimizer has in common with others. Nothing here syncs with the host.

    Attributes:
        links: By parameter; those alone that several optimizers hold.
    """

    def __init__(self) -> None:
        self.links: dict[Tensor, MasterLink] = {}

    def hold(self, param: Tensor, master: Tensor, held: Any, store: str) -> None:
        """Notes that this optimizer holds the master of a parameter: see `MasterLink`."""
        link = _link_of(param)
        if link is None or link.master is not master:
            self.links.pop(param, None)
            link = MasterLink(master, held, store)
            setattr(param, LINK, link)
        link.holders.add(self)
        if len(link.holders) > 1:
            for holder in link.holders:
                holder.links[param] = link

    def others(self, param: Tensor) -> Tensor | None:
        """Returns the master that another optimizer holds for a parameter as it is now, or None."""
        link = _link_of(param)
        master = None if link is None else link.master
        if link is None or master is None or not set(link.holders) - {self}:
            return None
        fits = master.shape == param.shape and master.device == param.device
        return master if fits else None

    def held_by_others(self, param: Tensor, store: str) -> Any:
        """Returns what another optimizer holds of the master that `others` returns.

        Raises:
            ArgumentError: It keeps masters otherwise.
        """
        link = _link_of(param)
        if link is None or link.store != store:
            kept = None if link is None else link.store
            raise ArgumentError(
                f"masters: expected {kept!r} for a parameter of shape {list(param.shape)} whose "
                f"master another optimizer keeps so, got {store!r}. A shared parameter has one "
                "master: give both optimizers the same masters=."
            )
        return link.held

    def note(self, params: Iterable[Tensor] | None = None) -> None:
        """Notes that these parameters (all by default) are their rounded masters now."""
        links = self.links
        for param in links if params is None else (p for p in params if p in links):
            (links[param].fits_since,) = writes_to([param])
            links[param].loaded.clear()

    def doubt(self, param: Tensor) -> None:
        """Notes that nobody knows whether a parameter fits its master."""
        if param in self.links:
            self.links[param].fits_since = SUSPECT

    def is_fit(self, param: Tensor) -> bool:
        """Whether another optimizer has written what a parameter is now."""
        link = self.links.get(param)
        return link is not None and [link.fits_since] == writes_to([param])

    def suspects(self, *codes: int) -> list[Tensor]:
        """Returns the parameters that are known as one of NEVER and SUSPECT."""
        return [param for param, link in self.links.items() if link.fits_since in codes]

    def note_loaded(self, param: Tensor) -> None:
        """Notes that this optimizer has loaded the master of a parameter that it holds."""
        link = _link_of(param)
        if link is not None:
            link.fits_since = NEVER
            link.loaded.add(self)
            if len(link.holders) > 1 and set(link.loaded) >= set(link.holders):
                link.loaded.clear()  # all have the same: the next one may load another


def conflicting(
    sharing: Sharing,
    values: Mapping[Tensor, Tensor],
    value_of: Callable[[Tensor], Tensor],
    *,
    loaded: bool,
) -> list[Tensor]:
    """Returns the parameters whose new master is not the one that another optimizer holds.

    Syncs with the host for parameters that others hold.

    Args:
        sharing: Of the optimizer that is given new masters.
        values: These, by parameter; those that nobody else holds do not matter.
        value_of: Returns the one that another optimizer holds.
        loaded: Whether masters that the other one has not loaded may be replaced.
    """
    found = []
    for param, value in values.items():
        link = _link_of(param)
        if sharing.others(param) is None or link is None:
            continue
        if loaded and not set(link.loaded) - {sharing}:
            continue
        here = held_here(value_of(param))
        given = held_here(value).to(here.device)
        if not torch.equal(here.view(torch.int32), given.view(torch.int32)):
            found.append(param)
    return found


def _link_of(param: Tensor) -> MasterLink | None:
    link = getattr(param, LINK, None)
    return link if isinstance(link, MasterLink) else None
