"""From `[REF=COEF]...` and `--base` to a base in memory with the vectors attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_prefvec.errors import InputError

if TYPE_CHECKING:
    from lora_prefvec.artifact import Ingredient
    from lora_prefvec.inference import LiveMixer, LoadedBase
    from lora_prefvec.vector import PreferenceVector

Quantization = Literal["nf4", "none"]


@dataclass(frozen=True)
class Live:
    """A base and a mix that were found and belong together; nothing of the base is loaded yet.

    Args:
        base: what it is called.
        vectors: what a vector is called while it is live -> the vector.
        mix: the same names -> coefficients to begin with.
    """

    base: str
    folder: Path
    quantization: Quantization
    vectors: dict[str, PreferenceVector]
    mix: dict[str, float]

    def load(self) -> tuple[LoadedBase, LiveMixer]:
        """The base in memory, the vectors attached and their coefficients set."""
        from lora_prefvec.inference import LiveMixer, load_base

        loaded = load_base(self.folder, quantization=self.quantization)
        mixer = LiveMixer(loaded.model, self.vectors)
        mixer.set_mix(self.mix)
        return loaded, mixer


def find_live(refs: Sequence[str], base: str | None, quantization: Quantization | None, allow_mismatch: bool) -> Live:
    """Find the vectors and the base, and check that they belong together.

    Args:
        base: the base that the first vector was trained on, where None.
        quantization: as the first vector was trained where None, and nf4 where that is not known.

    Raises:
        InputError: a reference, a coefficient or the base is wrong, or a vector belongs to another base.
    """
    from lora_prefvec.artifact import check_same_base, identity_of, open_mix, resolve_base
    from lora_prefvec.vector import parse_reference

    asked = [parse_reference(ref) for ref in refs]
    for ref, _ in asked:
        if ref == "sandbox" or (Path(ref) / "config.json").is_file():
            raise InputError(f"{ref} is a base and no vector", f"Write --base {ref}.")
    ingredients = open_mix(asked, allow_mismatch=allow_mismatch)
    if base is None:
        base, folder = base_of(ingredients)
    else:
        folder = resolve_base(base)
    identity = identity_of(folder, base)
    for one in ingredients if not allow_mismatch else []:
        fix = "Name its own base with --base, or mix anyway with --allow-mismatch."
        check_same_base((one.ref, one.adapter.vector.identity), (base, identity), fix)

    names: dict[str, str] = {}  # reference -> name
    vectors: dict[str, PreferenceVector] = {}
    mix: dict[str, float] = {}
    for (_, coefficient), one in zip(asked, ingredients, strict=True):
        if one.ref not in names:
            name = one.name if "/" in one.ref else one.ref
            names[one.ref] = one.ref if name in vectors else name
        vectors[names[one.ref]] = one.adapter.vector
        mix[names[one.ref]] = mix.get(names[one.ref], 0.0) + coefficient
    return Live(base, folder, quantization or trained_in(ingredients), vectors, mix)


def base_of(ingredients: Sequence[Ingredient]) -> tuple[str, Path]:
    """The base of the first vector that names one: what it is called, and its folder.

    Raises:
        InputError: none names a base, or that base is not to be found from here.
    """
    from lora_prefvec.artifact import resolve_base

    for one in ingredients:
        if identity := one.adapter.vector.identity:
            try:
                return identity.id, resolve_base(identity.id, identity.revision)
            except InputError as error:
                problem = f"the base {identity.id!r} that {one.ref!r} was trained on was not found"
                raise InputError(problem, "Name its folder or Hub id with --base.") from error
    raise InputError("there is no base to talk to", "Name one with --base, for example --base sandbox.")


def trained_in(ingredients: Sequence[Ingredient]) -> Quantization:
    """How the base was loaded when the first vector was trained."""
    facts = ingredients[0].adapter.provenance if ingredients else None
    return "none" if facts and facts.base and facts.base.quantization == "none" else "nf4"
