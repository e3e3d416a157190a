"""Preference vectors live on a running model: coefficients change between two forwards, for all rows or for each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_prefvec.errors import InputError, nearest
from lora_prefvec.vector import BaseIdentity, LowRankDelta, PreferenceVector, check_coefficient, common_identity


class LiveMixer:
    """Adds vectors to the outputs of a model's linear layers, with coefficients that cost one small write to change.

    A layer answers `base(x) + ((x @ A_all.T) * gate) @ B_all.T`: all vectors stacked once per module, and a gate built
    from the coefficients. The weights are never touched, so the model may be in any precision, NF4 included.

        with LiveMixer(model, {"helpful": helpful, "harmless": harmless}) as mixer:
            mixer.set_mix({"helpful": 1.0, "harmless": 0.5})            # the whole batch
            mixer.set_mix([{"helpful": 1.0}, {"harmless": -0.5}, {}])   # one mix per row

    Args:
        model: a causal LM whose layers are `nn.Linear` (bitsandbytes' included) or transformers' `Conv1D`.
        vectors: name -> vector, attached at coefficient 0; more may follow with `attach`.
        dtype: precision of the factors and of the vectors' part of a forward.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: Mapping[str, PreferenceVector] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._identities: dict[str, BaseIdentity | None] = {}  # of the attached vectors, in order of attachment
        self._sites: dict[str, _Site] = {}
        self._gates: dict[tuple[_Layout, torch.device], Tensor] = {}
        self._mix: dict[str, float] | list[dict[str, float]] = {}
        self.attach(vectors or {})

    def __enter__(self) -> LiveMixer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def names(self) -> list[str]:
        """The attached vectors, in order of attachment."""
        return list(self._identities)

    @property
    def mix(self) -> dict[str, float] | list[dict[str, float]]:
        """What `set_mix` was last given, less the vectors removed since."""
        return dict(self._mix) if isinstance(self._mix, dict) else [dict(row) for row in self._mix]

    @torch.inference_mode(False)
    def attach(self, vectors: Mapping[str, PreferenceVector]) -> None:
        """Adds vectors at coefficient 0; the current mix stays. All are attached, or on an error none.

        Raises:
            InputError: a name is taken, a vector belongs to another base than the rest, or a module of a vector is not
                in the model, is no linear layer, or has another shape.
        """
        for name in vectors:
            if name in self._identities:
                raise InputError(f"a vector {name!r} is already attached", "Remove it first, or choose another name.")
        identities = self._identities | {name: vector.identity for name, vector in vectors.items()}
        common_identity(identities.values())
        layers = {
            module: self._layer(name, module, delta)
            for name, vector in vectors.items()
            for module, delta in vector.deltas.items()
        }
        try:
            for module, layer in layers.items():
                if module not in self._sites:
                    self._sites[module] = _Site(module, layer, self._dtype)
                self._sites[module].add(
                    {name: vector.deltas[module] for name, vector in vectors.items() if module in vector.deltas}
                )
        except BaseException:  # out of memory, Ctrl-C
            self._drop(vectors)
            raise
        self._identities = identities
        self._apply()

    @torch.inference_mode(False)
    def remove(self, *names: str) -> None:
        """Takes vectors off the model and out of the current mix.

        Raises:
            InputError: no vector of that name is attached.
        """
        self._check_names(names)
        self._identities = {name: identity for name, identity in self._identities.items() if name not in names}
        self._drop(names)
        rows = [{n: c for n, c in row.items() if n not in names} for row in self._rows()]
        self._mix = rows[0] if isinstance(self._mix, dict) else rows
        self._apply()

    def set_mix(self, mix: Mapping[str, float] | Sequence[Mapping[str, float]]) -> None:
        """Sets the coefficients of the next forwards; a vector that is not named has coefficient 0.

        Args:
            mix: name -> coefficient for the whole batch, or a list of these, one per row; `{}` is the base.

        Raises:
            InputError: an unknown name, a coefficient that is not finite, an empty list.
        """
        rows = [mix] if isinstance(mix, Mapping) else list(mix)
        if not rows:
            raise InputError("a list of mixes for no row at all", "Give one mix per row, or {} for the base.")
        checked = []
        for row in rows:
            self._check_names(row)
            checked.append({name: check_coefficient(name, coefficient) for name, coefficient in row.items()})
        self._mix = checked[0] if isinstance(mix, Mapping) else checked
        self._apply()

    def detach(self) -> None:
        """Takes every vector and hook off: the model is bit for bit what it was before."""
        for site in self._sites.values():
            site.detach()
        self._identities, self._sites, self._gates, self._mix = {}, {}, {}, {}

    def _rows(self) -> list[dict[str, float]]:
        return [self._mix] if isinstance(self._mix, dict) else self._mix

    @torch.inference_mode(False)
    def _apply(self) -> None:
        """Writes the gates of the current mix, and narrows the factors where another set of vectors is active.

        Inference mode is off here and in `attach`: what it makes could not be written or trained through later.
        """
        rows = self._rows()
        active = {name for name in self._identities if any(row.get(name, 0.0) for row in rows)}
        gates: dict[tuple[_Layout, torch.device], Tensor] = {}
        for site in self._sites.values():
            layout = site.activate(active)
            if not layout:
                site.gate = None
                continue
            key = layout, site.A.device
            if key not in gates:
                values = [[row.get(name, 0.0) for name, rank in layout for _ in range(rank)] for row in rows]
                gate = torch.tensor(values, dtype=self._dtype)
                gate = gate[0] if isinstance(self._mix, dict) else gate
                known = self._gates.get(key)
                # Written in place where it fits, so that a graph captured around the model sees the change.
                gates[key] = known.copy_(gate) if known is not None and known.shape == gate.shape else gate.to(key[1])
            site.gate = gates[key]
        self._gates = gates

    def _drop(self, names: Collection[str]) -> None:
        """Takes the named vectors off every site, and off the model the sites that are left with none."""
        for module, site in list(self._sites.items()):
            site.remove(names)
            if not site.layout:
                self._sites.pop(module).detach()

    def _check_names(self, names: Collection[str]) -> None:
        for name in names:
            if name not in self._identities:
                hint = nearest(name, self._identities) or "None is attached: attach it first."
                raise InputError(f"no vector {name!r} is attached", hint)

    def _layer(self, name: str, module: str, delta: LowRankDelta) -> nn.Module:
        """The layer of the model that a delta of vector `name` changes."""
        try:
            layer = self._model.get_submodule(module)
        except AttributeError:
            linear = [known for known, candidate in self._model.named_modules() if _shape(candidate)]
            raise InputError(
                f"vector {name!r} changes {module}, which this model does not have",
                f"Use a vector of this base. {nearest(module, linear)}",
            ) from None
        shape = _shape(layer)
        if shape is None:
            raise InputError(
                f"vector {name!r} changes {module}, which is a {type(layer).__name__} and no linear layer",
                "Compose the vector into an adapter or fold it instead.",
            )
        if shape != delta.shape:
            raise InputError(
                f"vector {name!r} is {list(delta.shape)} at {module}, where this model is {list(shape)}",
                "Use a vector of this base.",
            )
        return layer


_Layout = tuple[tuple[str, int], ...]  # (vector, rank) of the stacked factors, in their order


class _Site:
    """One hooked layer with the factors of all vectors that change it.

    Both factors are stacked by rows, A [R, in] and B_T [R, out], so that neighbouring vectors can be taken as a view.
    """

    def __init__(self, module: str, layer: nn.Module, dtype: torch.dtype) -> None:
        shape = _shape(layer)
        assert shape is not None
        device = next(layer.parameters()).device
        self.module = module
        self.layout: _Layout = ()
        self.A_all = torch.empty(0, shape[1], dtype=dtype, device=device)
        self.B_T_all = torch.empty(0, shape[0], dtype=dtype, device=device)
        self.active: _Layout | None = None  # which of them A and B_T hold now; None: to be narrowed anew
        self.A, self.B_T = self.A_all, self.B_T_all
        # [R] for the whole batch, [rows, R] for one mix per row, None where nothing is active.
        self.gate: Tensor | None = None
        self.handle = layer.register_forward_hook(self._add_vectors)

    def add(self, deltas: Mapping[str, LowRankDelta]) -> None:
        A_all = torch.cat([self.A_all, *(delta.A.to(self.A_all) for delta in deltas.values())])
        B_T_all = torch.cat([self.B_T_all, *(delta.B.T.to(self.B_T_all) for delta in deltas.values())])
        self.A_all, self.B_T_all = A_all, B_T_all
        self.layout += tuple((name, delta.rank) for name, delta in deltas.items())
        self.active = None

    def remove(self, names: Collection[str]) -> None:
        kept = tuple((name, rank) for name, rank in self.layout if name not in names)
        if kept != self.layout:
            A, B_T = self._rows_of(kept)
            self.A_all, self.B_T_all = A.clone(), B_T.clone()  # a view would keep what was removed in memory
            self.layout, self.active = kept, None

    def activate(self, names: set[str]) -> _Layout:
        """Narrows the factors to the named vectors; nothing moves where the same ones are active already."""
        active = tuple((name, rank) for name, rank in self.layout if name in names)
        if active != self.active:
            self.A, self.B_T = self._rows_of(active)
            self.active = active
        return active

    def detach(self) -> None:
        self.handle.remove()

    def _rows_of(self, wanted: _Layout) -> tuple[Tensor, Tensor]:
        """The rows of both factors that belong to the wanted vectors: views where those are neighbours."""
        spans: list[slice] = []
        start = 0
        for entry in self.layout:
            stop = start + entry[1]
            if entry in wanted:
                joined = spans.pop().start if spans and spans[-1].stop == start else start
                spans.append(slice(joined, stop))
            start = stop
        if len(spans) <= 1:
            span = spans[0] if spans else slice(0, 0)
            return self.A_all[span], self.B_T_all[span]
        return torch.cat([self.A_all[span] for span in spans]), torch.cat([self.B_T_all[span] for span in spans])

    def _add_vectors(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """x [batch, ..., in], base(x) [batch, ..., out] -> base(x) plus the mix; None leaves base(x) as it is."""
        gate = self.gate
        if gate is None:
            return None
        x, base = cast(Tensor, inputs[0]), cast(Tensor, output)
        if gate.ndim == 2:
            if x.ndim < 3 or x.shape[0] != gate.shape[0]:
                raise InputError(
                    f"{gate.shape[0]} mixes were set, one per row, but {self.module} got a batch of {list(x.shape)}",
                    "Give one mix per row of the batch, or one mix for all rows.",
                )
            gate = gate.view(gate.shape[0], *[1] * (x.ndim - 2), gate.shape[1])
        projected = nn.functional.linear(x.to(self.A.dtype), self.A) * gate
        return base + (projected @ self.B_T).to(base.dtype)


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer; None for anything else. Packed 4-bit weights have another shape than their layer."""
    for out_size, in_size in (("out_features", "in_features"), ("nf", "nx")):  # nn.Linear; transformers' Conv1D
        if hasattr(layer, out_size) and hasattr(layer, in_size):
            return int(getattr(layer, out_size)), int(getattr(layer, in_size))
    return None
