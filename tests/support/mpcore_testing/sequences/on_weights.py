"""The operations of the sequences on weights and states: edits, averages, checkpoints, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import torch

from mpcore_testing.sequences.compare import compare_scale_state
from mpcore_testing.sequences.numbers import rounded
from mpcore_testing.sequences.pair import Pair, flat
from mpcore_testing.sequences.state import EVERY, PARAMETERS


class OnWeights(Pair):
    """Each method drives both, the engine and its model."""

    def edit_weight(self, i: int, kind: str, number: float) -> None:
        """Writes to a weight, in a way that autograd counts."""
        values = np.array(self.model.weights[i])
        if kind == "element":
            values[-1] = rounded(number, PARAMETERS[i][0])
        elif kind == "multiply":
            values = rounded(values * number, PARAMETERS[i][0])
        self.write(i, values)
        self.model.edit_weight(i, values)

    def bad_weight(self, i: int, number: float) -> None:
        """Writes a number that is not finite to a weight that has a master."""
        if i in self.model.made:
            values = np.array(self.model.weights[i])
            values[0] = number
            self.write(i, values)
            self.model.edit_weight(i, values)

    def mend_weights(self) -> None:
        """Writes finite numbers where there are others."""
        for i in EVERY:
            values = self.model.weights[i]
            if not np.isfinite(values).all():
                values = np.where(np.isfinite(values), values, 1.0)
                self.write(i, values)
                self.model.edit_weight(i, values)

    def swap(self, factor: float) -> None:
        """An average is there for an evaluation; what is saved meanwhile are exact masters."""
        kept = [param.detach().clone() for param in self.params]
        for i in EVERY:
            self.write(i, rounded(self.model.weights[i] * factor, PARAMETERS[i][0]))
        saved = self.optimizer.state_dict()["state"]
        for i in self.model.made:
            self.check_near("a saved master", flat(saved[i]["master"]), self.model.masters[i])
        self.optimizer.check_masters()
        with torch.no_grad():
            for param, value in zip(self.params, kept, strict=True):
                param.copy_(value)

    def sync(self, exact: bool) -> None:
        """Of finite weights: masters that are not can only be garbage from then on."""
        if not all(np.isfinite(weight).all() for weight in self.model.weights):
            return
        self.optimizer.sync_masters_from_model(exact=exact)
        self.model.sync(exact=exact)

    def rate(self, group: int, factor: float) -> None:
        self.optimizer.param_groups[group]["lr"] *= factor
        self.model.rates[group] *= factor

    def read(self) -> None:
        """Looks at everything, which changes nothing."""
        saved = self.optimizer.state_dict()
        compare_scale_state(saved["mpcore"]["loss_scale"], self.model.scale)
        repr(self.optimizer)
        stale = [i for i in self.model.made if self.model.differs(i).any()]
        assert len(self.optimizer.check_masters()) == len(stale)

    # ------------------------------------------------------------------ states

    def checkpoint(self) -> Any:
        """What a checkpoint holds, of both."""
        weights = [param.detach().clone() for param in self.params]
        return copy.deepcopy((self.optimizer.state_dict(), weights, self.model))

    def save(self) -> None:
        self.saved = self.checkpoint()

    def restore(self) -> None:
        """Loads it into the same optimizer; gradients that are there stay."""
        if self.saved is None:
            return
        state, weights, model = copy.deepcopy(self.saved)
        self.optimizer.load_state_dict(state)
        with torch.no_grad():
            for param, value in zip(self.params, weights, strict=True):
                param.copy_(value)
        self.model.drop()
        model.take_gradients_of(self.model)
        model.begin_anew(loaded=True)
        self.model = model

    def reload(self, with_first_weights: bool) -> None:
        """A new process: fresh weights, a fresh optimizer, and what was saved to a file."""
        file = io.BytesIO()
        weights = [param.detach() for param in self.params]
        torch.save((self.optimizer.state_dict(), weights), file)
        file.seek(0)
        state, weights = torch.load(file, weights_only=True)
        self.params = [torch.nn.Parameter(weight.clone()) for weight in weights]
        self.optimizer = self.wrap()
        self.optimizer.load_state_dict(state)
        self.model.lose_gradients()
        self.model.begin_anew(loaded=True)
        if with_first_weights:  # the model's state was forgotten
            for i, (_, _, first) in enumerate(PARAMETERS):
                self.write(i, first)
                self.model.edit_weight(i, np.array(first))

    def copy(self, way: str) -> None:
        """The copy goes on, and the original is gone."""
        pair = (self.params, self.optimizer)
        pair = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        self.params, self.optimizer = pair
        self.model.lose_gradients()
        self.model.begin_anew(loaded=False)

    def recover(self, before: Any) -> None:
        """Does what the message after an exception in the midst of writing says.

        Args:
            before: A checkpoint to load; None: clearing gradients is enough.
        """
        if before is not None:
            state, weights, model = before
            self.optimizer.load_state_dict(state)
            with torch.no_grad():
                for param, value in zip(self.params, weights, strict=True):
                    param.copy_(value)
            self.model = model
            self.model.begin_anew(loaded=True)
        self.optimizer.zero_grad()
        self.model.drop()
        self.model.lose_gradients()
