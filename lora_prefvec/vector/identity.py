"""Which base a vector belongs to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseIdentity:
    """What must agree before a vector may be added to a base, or to another vector.

    Args:
        id: Hub id, name or folder of the base.
        revision: commit of a Hub base; None for a local folder.
        config_sha256: hash of the architecture, as `config.json` states it.
        tokenizer_sha256: hash of `tokenizer.json` (or of the files that stand for it).
        template_sha256: hash of the chat template; None where the tokenizer has none.
        quantization: what the base was quantised to while training: `nf4`, or `none`.
    """

    id: str
    revision: str | None = None
    config_sha256: str | None = None
    tokenizer_sha256: str | None = None
    template_sha256: str | None = None
    quantization: str = "none"

    def mismatches(self, other: BaseIdentity) -> list[str]:
        """The facts on which two identities differ, each as `name: here != there`; unknown facts agree with all.

        The id and the quantisation are left out: a base may lie under another path, and NF4 is a way of loading it.
        """
        facts = {"config": "config_sha256", "tokenizer": "tokenizer_sha256", "chat template": "template_sha256"}
        found = []
        for name, field in facts.items():
            here, there = getattr(self, field), getattr(other, field)
            if here is not None and there is not None and here != there:
                found.append(f"{name}: {here[:12]} != {there[:12]}")
        return found
