"""How a mix ranks held-out pairs: the implicit reward of DPO, with no reply generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_prefvec.data import load
from lora_prefvec.data.files import suffix_of
from lora_prefvec.data.sources import INSTALLED
from lora_prefvec.evaluation.statistics import Score, from_error, from_share
from lora_prefvec.output import out

if TYPE_CHECKING:
    from lora_prefvec.data import Pair, PairSet
    from lora_prefvec.inference import LiveMixer, LoadedBase, PreferenceAccuracy
    from lora_prefvec.progress import Progress
    from lora_prefvec.vector import Coefficient

BATCH = 8  # pairs of one forward


def held_out_pairs(source: str, *, split: str | None = None, form: str | None = None) -> PairSet:
    """Pairs to measure on, of the splits that training leaves alone: `test` on the Hub, `held_out` of a sandbox.

    Args:
        source: as `data.load` takes it; a file is one split, whatever it is called.

    Raises:
        InputError: as `data.load`.
    """
    path = Path(source).expanduser()
    if split is None:
        is_file = path.exists() or bool(suffix_of(path))
        split = "train" if is_file else "held_out" if INSTALLED.fullmatch(source) else "test"
    return load(source, split=split, form=form)


def implicit_preference(
    loaded: LoadedBase,
    mixer: LiveMixer,
    mixes: Sequence[Mapping[str, Coefficient]],
    pairs: Sequence[Pair],
    *,
    max_prompt_tokens: int = 512,
    max_reply_tokens: int = 512,
    batch_size: int = BATCH,
    bar: Progress | None = None,
) -> list[PreferenceAccuracy]:
    """For every mix, how often and how clearly it prefers the chosen reply more than the base does.

    Args:
        mixer: on the base's model; its own mix is set again afterwards.
        pairs: held out from the vectors' training; long ones are cut as `render_pairs` cuts them, which is told.
        max_prompt_tokens, max_reply_tokens: at most, and no more than the base's context holds together.
        batch_size: pairs per forward.
        bar: advanced by one for each pair and mix, and once more for each pair under the base.

    Raises:
        InputError: the pairs cannot be rendered, or a mix names an unknown vector.
    """
    from lora_prefvec.inference import pair_log_probs, preference_accuracy, render_pairs

    checked = [mixer.check(mix) for mix in mixes]
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if context:
        max_reply_tokens = min(max_reply_tokens, max(context // 2, context - max_prompt_tokens))
        max_prompt_tokens = min(max_prompt_tokens, context - max_reply_tokens)
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_reply_tokens": max_reply_tokens}
    whole = render_pairs(pairs, loaded.tokenizer, **limits)
    rendered = whole.pairs
    if whole.cut_prompts or whole.cut_replies:
        out.warn(
            f"of {len(pairs)} pairs {whole.cut_prompts} lose the beginning of their prompt, of which "
            f"{max_prompt_tokens} tokens are read, and {whole.cut_replies} the end of a reply, of which "
            f"{max_reply_tokens} are; {whole.indistinct} are left out, which are equal then"
        )
    before, found = mixer.mix, []
    try:
        for mix in [{}, *checked]:
            mixer.set_mix(mix)
            found.append(
                pair_log_probs(
                    loaded.model,
                    rendered,
                    pad_token_id=loaded.tokenizer.pad_token_id,
                    batch_size=batch_size,
                    on_batch=bar.advance if bar else None,
                )
            )
    finally:
        mixer.set_mix(before)
    reference, *policies = found
    return [preference_accuracy(policy, reference) for policy in policies]


def preference_scores(found: PreferenceAccuracy) -> dict[str, Score]:
    """Accuracy and margin with their intervals."""
    return {
        "preference_accuracy": from_share(found.accuracy, found.accuracy_error, found.pairs),
        "implicit_margin": from_error(found.margin, found.margin_error, found.pairs),
    }
