"""From references with coefficients to a mix, its provenance, and the `mix.yaml` that makes it again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lora_prefvec.artifact.approximate import approximate
from lora_prefvec.artifact.folder import Adapter, read_adapter
from lora_prefvec.artifact.peft_config import FILE as CONFIG
from lora_prefvec.artifact.provenance import Parent, Provenance, first_complaint, read_json
from lora_prefvec.artifact.reference import commit_of, is_adapter, public_name, resolve_adapter, resolve_base
from lora_prefvec.artifact.workers import workers
from lora_prefvec.errors import InputError
from lora_prefvec.vector import (
    BaseIdentity,
    Coefficient,
    Filter,
    Merged,
    Method,
    Mix,
    MixEntry,
    MixTerm,
    PreferenceVector,
    parse_layers,
    parse_term,
    written_layers,
)

Dtype = Literal["float32", "bfloat16", "float16"]
_OVERRIDE = "Use vectors of one base, or go on at your own risk with --allow-mismatch."


@dataclass(frozen=True)
class Ingredient:
    """A vector of a mix as it was asked for: reference, what lies there, coefficient, and the part of it that counts.

    Args:
        fit_error: of a DoRA, what its low-rank fit leaves out, relative to its dense delta; None for any other.
    """

    ref: str
    adapter: Adapter
    coefficient: Coefficient = 1.0
    filter: Filter = field(default_factory=Filter)
    fit_error: float | None = None

    @property
    def name(self) -> str:
        """Its preference where that is known, else what it was called."""
        facts = self.adapter.provenance
        return (facts.preference if facts else None) or public_name(self.ref.partition("@")[0])

    def parent(self) -> Parent:
        """What provenance keeps of it."""
        return Parent(
            name=self.name,
            sha256=self.adapter.sha256,
            coefficient=self.coefficient,
            filter=str(self.filter) or None,
            revision=commit_of(self.adapter.path),
        )


_Number = Annotated[float, Field(allow_inf_nan=False)]


class MixVector(BaseModel):
    """One vector of `mix.yaml`: its coefficient, or a gradient over the layers, and the part of it that counts.

    `vector` is a name, a Hub id, or a folder relative to the file (it begins with a dot).
    """

    model_config = ConfigDict(extra="forbid")

    vector: str
    coefficient: _Number | Annotated[list[_Number], Field(min_length=1)] = 1.0
    layers: str | None = None
    modules: list[str] | None = None
    revision: str | None = None
    sha256: str | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _a_range(cls, layers: Any) -> Any:
        try:
            return None if layers is None else written_layers(parse_layers(layers))
        except InputError as error:
            raise ValueError(str(error)) from None

    @property
    def filter(self) -> Filter:
        """`layers` and `modules` as a filter."""
        return Filter(parse_layers(self.layers) if self.layers else None, tuple(self.modules or ()))


class MixSettings(BaseModel):
    """How the vectors of a mix become one; the numbers are those of `lora_prefvec.vector.merge`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = "exact"
    rank: Annotated[int, Field(ge=1)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    seed: Annotated[int, Field(ge=0)] = 0
    normalize: bool = False

    @model_validator(mode="after")
    def _one_cut(self) -> MixSettings:
        if self.rank is not None and self.energy is not None:
            raise ValueError("a mix is cut either to a rank or to an energy")
        return self


class MixFile(MixSettings):
    """`mix.yaml`: all that `prefvec compose` needs to make a mix again.

    `approximate` names the base against which DoRAs among the vectors are fitted.
    """

    base: str | None = None
    revision: str | None = None
    approximate: str | None = None
    dtype: Dtype = "float32"
    vectors: Annotated[list[MixVector], Field(min_length=1)]

    def to_yaml(self) -> str:
        """The text of `mix.yaml`."""
        head = "# Makes this folder again: prefvec compose mix.yaml --out DIR\n"
        facts = self.model_dump(exclude_none=True)
        asked = self.settings.model_dump(exclude_defaults=True)
        order = ["base", "revision", "approximate", "method", *asked, "dtype", "vectors"]
        return head + yaml.safe_dump(
            {key: facts[key] for key in dict.fromkeys(order) if key in facts}, sort_keys=False, allow_unicode=True
        )

    @property
    def settings(self) -> MixSettings:
        """How its vectors become one, without which they are."""
        return MixSettings(**{key: getattr(self, key) for key in MixSettings.model_fields})


def read_mix_file(path: str | Path) -> MixFile:
    """The mix that a YAML file describes.

    Raises:
        InputError: the file is missing, no YAML, or has an unknown or wrong field.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "Give a mix.yaml.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}", "Mend the file.") from None
    try:
        return MixFile.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path} describes no mix: {first_complaint(error)}", "Mend the file.") from None


def open_mix(
    references: Sequence[MixTerm | tuple[str, Coefficient]],
    *,
    approximate_on: Path | None = None,
    rank: int | None = None,
    allow_mismatch: bool = False,
) -> list[Ingredient]:
    """Find and read the vectors of a mix, and check that they belong to one base.

    Args:
        references: (reference, coefficient) each, and perhaps a filter.
        approximate_on: folder of the base on which DoRAs are fitted to `rank`, or to their own; without it they are
            refused.
        allow_mismatch: take vectors of different bases, or whose weights were changed; they are then said to belong to
            the base of the first.

    Raises:
        InputError: there is no such vector, it cannot be read, or it belongs to another base than the first.
    """
    terms = [MixTerm(*reference) for reference in references]
    with workers() as pool:
        read = pool.map(lambda term: _read(term.ref, approximate_on, rank, check_hash=not allow_mismatch), terms)
        found = [
            Ingredient(term.ref, adapter, term.coefficient, term.filter, error)
            for term, (adapter, error) in zip(terms, read, strict=True)
        ]
    if approximate_on and all(ingredient.fit_error is None for ingredient in found):
        raise InputError(
            "none of the vectors is a DoRA, so there is nothing to approximate", "Leave --approximate out."
        )
    known = [ingredient for ingredient in found if ingredient.adapter.vector.identity]
    if allow_mismatch:
        identity = known[0].adapter.vector.identity if known else None
        return [replace(one, adapter=_of_base(one.adapter, identity)) for one in found]
    for ingredient in known[1:]:
        check_same_base(
            (known[0].ref, known[0].adapter.vector.identity), (ingredient.ref, ingredient.adapter.vector.identity)
        )
    return found


def reopen_mix(path: str | Path, *, allow_mismatch: bool = False) -> list[Ingredient]:
    """The vectors of a `mix.yaml`, with the weights that it names.

    Raises:
        InputError: as `read_mix_file` and `open_mix`, or a vector has other weights than it had.
    """
    file, references = read_mix_file(path), []
    entries, base = file.vectors, None
    if file.approximate:
        base = resolve_base(_beside(path, file.approximate))
    for entry in entries:
        ref = _beside(path, entry.vector)
        if entry.revision and ref == entry.vector and "@" not in ref:
            ref = f"{ref}@{entry.revision}"
        coefficient = tuple(entry.coefficient) if isinstance(entry.coefficient, list) else entry.coefficient
        references.append(MixTerm(ref, coefficient, entry.filter))
    found = open_mix(references, approximate_on=base, rank=file.rank, allow_mismatch=allow_mismatch)
    for entry, ingredient in zip(entries, found, strict=True):
        if entry.sha256 and entry.sha256 != ingredient.adapter.sha256 and not allow_mismatch:
            raise InputError(
                f"{ingredient.ref} has weights {ingredient.adapter.sha256[:12]}..., and {path} was made with "
                f"{entry.sha256[:12]}...",
                "Get those weights, or take these with --allow-mismatch.",
            )
    return found


def typed_mix(
    refs: Sequence[str], *, approximate_on: Path | None = None, rank: int | None = None, allow_mismatch: bool = False
) -> tuple[list[Ingredient], MixFile | None]:
    """The mix that a person typed: `REF=COEF...`, or one `mix.yaml`, which is then returned too.

    Raises:
        InputError: as `parse_term`, `open_mix` and `reopen_mix`.
    """
    if len(refs) == 1 and refs[0].endswith((".yaml", ".yml")):
        if approximate_on:
            raise InputError(f"{refs[0]} says itself on what a DoRA is fitted", "Write approximate: BASE into it.")
        return reopen_mix(refs[0], allow_mismatch=allow_mismatch), read_mix_file(refs[0])
    terms = [parse_term(ref) for ref in refs]
    return open_mix(terms, approximate_on=approximate_on, rank=rank, allow_mismatch=allow_mismatch), None


def compose(ingredients: Sequence[Ingredient]) -> PreferenceVector:
    """The sum of coefficient x vector, exactly."""
    return merge_mix(ingredients).vector


def merge_mix(ingredients: Sequence[Ingredient], settings: MixSettings | None = None) -> Merged:
    """The vectors of a mix as one, in the way that `settings` ask for: exactly, where None.

    Raises:
        InputError: as `lora_prefvec.vector.merge`.
    """
    mix = Mix([MixEntry(one.name, one.adapter.vector, one.coefficient, one.filter) for one in ingredients])
    asked = settings or MixSettings()
    return mix.merge(**{name: getattr(asked, name) for name in MixSettings.model_fields})


def mix_provenance(
    ingredients: Sequence[Ingredient],
    vector: PreferenceVector,
    kind: Literal["mix", "fold"],
    merged: Merged | None = None,
) -> Provenance:
    """The provenance of a composed vector, or of a model with it folded in.

    Args:
        merged: how `vector` was made; exactly, where None.
    """
    metrics: dict[str, float | None] = {
        f"fit_error {one.name}": one.fit_error for one in ingredients if one.fit_error is not None
    }
    if merged and merged.energy < 1:
        metrics["energy_kept"] = merged.energy
    return Provenance(
        kind=kind,
        method=merged.method if merged else "exact",
        base=vector.identity,
        parents=[ingredient.parent() for ingredient in ingredients],
        metrics=metrics,
    )


def mix_file(
    ingredients: Sequence[Ingredient],
    vector: PreferenceVector,
    target: Path,
    dtype: Dtype,
    settings: MixSettings | None = None,
    fitted_on: str | None = None,
) -> MixFile:
    """The `mix.yaml` of a mix that is written to `target`; local folders are named relative to it.

    Args:
        fitted_on: the base on which DoRAs were approximated.
    """
    vectors = []
    for ingredient in ingredients:
        ref = ingredient.ref
        if is_adapter(Path(ref).expanduser()):
            ref = _relative(ref, target)
        coefficient, part = ingredient.coefficient, ingredient.filter
        vectors.append(
            MixVector(
                vector=ref.partition("@")[0],
                coefficient=list(coefficient) if isinstance(coefficient, tuple) else coefficient,
                layers=written_layers(part.layers) if part.layers else None,
                modules=list(part.modules) or None,
                revision=commit_of(ingredient.adapter.path),
                sha256=ingredient.adapter.sha256,
            )
        )
    base = vector.identity
    if fitted_on and Path(fitted_on).expanduser().is_dir():
        fitted_on = _relative(fitted_on, target)
    return MixFile(
        base=base.id if base else None,
        revision=base.revision if base else None,
        approximate=fitted_on,
        dtype=dtype,
        vectors=vectors,
        **(settings or MixSettings()).model_dump(),
    )


def extract_provenance(positive: Ingredient, negative: Ingredient, vector: PreferenceVector) -> Provenance:
    """The provenance of d+ - d-: what the positive run says, and both as parents.

    Raises:
        InputError: the two say that they are the other way round, or of two preferences.
    """
    plus, minus = positive.adapter.provenance, negative.adapter.provenance
    if (plus and plus.sign == -1) or (minus and minus.sign == 1):
        wrong = positive.ref if plus and plus.sign == -1 else negative.ref
        labels = "with swapped labels" if wrong == positive.ref else "with the labels as given"
        raise InputError(f"{wrong} was trained {labels}", "Write: prefvec extract POSITIVE NEGATIVE")
    names = {facts.preference for facts in (plus, minus) if facts and facts.preference}
    if len(names) > 1:
        raise InputError(
            f"the two adapters are of two preferences, {' and '.join(sorted(names))}", "Give a pair of one."
        )
    facts = plus or Provenance(kind="preference_vector")
    training = plus.training if plus else None
    if training and training.wall_seconds is not None and minus and minus.training:
        seconds = training.wall_seconds + (minus.training.wall_seconds or 0.0)
        training = training.model_copy(update={"wall_seconds": seconds})
    return facts.model_copy(
        update={
            "kind": "preference_vector",
            "preference": next(iter(names), None),
            "sign": 1,
            "base": vector.identity,
            "parents": [positive.parent(), negative.parent()],
            "training": training,
            "metrics": {},
            "weights_sha256": None,
        }
    )


def check_same_base(
    one: tuple[str, BaseIdentity | None], other: tuple[str, BaseIdentity | None], fix: str = _OVERRIDE
) -> None:
    """Compare the bases of two things, each given with what to call it.

    Hashes decide. Where one side has none, as in a plain PEFT adapter, the last parts of the ids do.

    Raises:
        InputError: they differ; the message names both sides.
    """
    (left, here), (right, there) = one, other
    if here is None or there is None:
        return
    found = here.mismatches(there)
    if not (here.config_sha256 and there.config_sha256):
        names = [identity.id.rpartition("/")[2].lower() for identity in (here, there)]
        found += [f"base: {names[0]} != {names[1]}"] if names[0] != names[1] else []
    if found:
        raise InputError(f"{left} belongs to {here.id!r} and {right} to {there.id!r} ({'; '.join(found)})", fix)


def _read(ref: str, base: Path | None, rank: int | None, check_hash: bool) -> tuple[Adapter, float | None]:
    """What lies at a reference; of a DoRA its fit on `base`, with the error."""
    folder = resolve_adapter(ref)
    if base is None or not read_json(folder / CONFIG).get("use_dora"):
        return read_adapter(folder, check_hash=check_hash), None
    fitted = approximate(folder, base, rank, check_hash=check_hash)
    return fitted.adapter, fitted.error


def _relative(ref: str, target: Path) -> str:
    """A local folder as `mix.yaml` in `target` names it: by a path that begins with a dot."""
    path = os.path.relpath(Path(ref).expanduser().resolve(), target.resolve())
    return path if path.startswith(".") else f"./{path}"


def _beside(file: str | Path, ref: str) -> str:
    """What `_relative` wrote, from where we stand; any other reference as it is."""
    return os.path.normpath(Path(file).parent / ref) if ref.startswith(".") else ref


def _of_base(adapter: Adapter, identity: BaseIdentity | None) -> Adapter:
    return replace(adapter, vector=replace(adapter.vector, identity=identity))
