"""Pairs as token ids: where a reply begins, what a length limit cuts, what cannot be rendered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_prefvec.data import Pair
from lora_prefvec.errors import InputError
from lora_prefvec.inference import RenderedPair, render_pairs
from lora_prefvec.inference.render import chat_ids, common_prefix, render
from tests.helpers import tiny_tokenizer

EOS, USER, ASSISTANT, BOS = 258, 260, 261, 257


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def text(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda words: tokenizer(words)["input_ids"]


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    return Pair(
        *(
            [{"role": role, "content": text}]
            for role, text in zip(("user", "assistant", "assistant"), (prompt, chosen, rejected), strict=True)
        )
    )


def with_bos(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


def test_messages_go_through_the_template(tokenizer: Any, text: Callable[[str], list[int]]) -> None:
    prompt, chosen, rejected = render(pair("hi", "yes", "no"), tokenizer)
    assert prompt == [USER, *text("hi"), EOS, ASSISTANT]
    assert chosen == [*text("yes"), EOS]
    assert rejected == [*text("no"), EOS]


def test_replies_of_several_turns_and_prompts_of_several_turns(
    tokenizer: Any, text: Callable[[str], list[int]]
) -> None:
    longer = Pair(
        chat("a", "b", "c"),
        [{"role": "assistant", "content": "yes"}],
        [
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "n"},
        ],
    )
    prompt, chosen, rejected = render(longer, tokenizer)
    assert prompt == [USER, *text("a"), EOS, ASSISTANT, *text("b"), EOS, USER, *text("c"), EOS, ASSISTANT]
    assert chosen == [*text("yes"), EOS]
    assert rejected == [*text("no"), EOS, USER, *text("?"), EOS, ASSISTANT, *text("n"), EOS]


def test_a_generation_prompt_that_replies_do_not_have_counts_as_reply(tokenizer: Any) -> None:
    """Templates such as Qwen3's open a block of thoughts that finished turns lack."""
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{% endif", "<|assistant|>ab{% endif")
    prompt, chosen, _ = render(pair("hi", "acid", "abide"), tokenizer)
    assert prompt[-1] == tokenizer("a")["input_ids"][0]  # shared by both replies, so it is prompt
    assert chosen == [*tokenizer("cid")["input_ids"], EOS]
    prompt, chosen, rejected = render(pair("hi", "yes", "no"), tokenizer)
    assert prompt[-1] == ASSISTANT
    assert (chosen, rejected) == ([*tokenizer("yes")["input_ids"], EOS], [*tokenizer("no")["input_ids"], EOS])


def test_strings_stand_as_they_are_and_end_with_eos(tokenizer: Any, text: Callable[[str], list[int]]) -> None:
    prompt, chosen, rejected = render(Pair("two and two", " is four", " is five<eos>"), tokenizer)
    assert prompt == text("two and two")
    assert chosen == [*text(" is four"), EOS]
    assert rejected == [*text(" is five"), EOS]  # not twice


def test_tokens_that_merge_across_the_boundary_count_as_reply() -> None:
    class Words:
        """Tokens are two letters, so that an odd prompt ends within one."""

        eos_token_id = 0

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [hash(text[i : i + 2]) for i in range(0, len(text), 2)]}

    prompt, chosen, rejected = render(Pair("abc", "de", "fg"), Words())
    assert prompt == [hash("ab")]
    assert chosen == [hash("cd"), hash("e"), 0]
    assert rejected == [hash("cf"), hash("g"), 0]


def test_a_tokenizer_that_closes_every_text_closes_no_prompt(tokenizer: Any, text: Callable[[str], list[int]]) -> None:
    from tokenizers.processors import TemplateProcessing

    expected = [text(words) for words in ("ab", "cd", "ef")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    prompt, chosen, rejected = render(Pair("ab", "cd", "ef"), tokenizer)
    assert [prompt, chosen, rejected] == [expected[0], [*expected[1], EOS], [*expected[2], EOS]]


def test_a_long_prompt_loses_its_beginning_and_a_long_reply_its_end(
    tokenizer: Any, text: Callable[[str], list[int]]
) -> None:
    found = render_pairs(
        [pair("abcdefgh", "yes", "no"), pair("a", "yes, of course", "n")],
        tokenizer,
        max_prompt_tokens=5,
        max_reply_tokens=4,
    )
    assert found.pairs == [
        RenderedPair([*text("fgh"), EOS, ASSISTANT], [*text("yes"), EOS], [*text("no"), EOS]),
        RenderedPair([USER, *text("a"), EOS, ASSISTANT], text("yes,"), [*text("n"), EOS]),
    ]
    assert (found.cut_prompts, found.cut_replies, found.indistinct) == (1, 1, 0)


def test_a_cut_prompt_keeps_its_bos(tokenizer: Any, text: Callable[[str], list[int]]) -> None:
    expected = text("fgh")
    found = render_pairs([Pair("abcdefgh", "x", "y")], with_bos(tokenizer), max_prompt_tokens=4, max_reply_tokens=4)
    assert found.pairs[0].prompt_ids == [BOS, *expected]
    exact = render_pairs([Pair("abc", "x", "y")], tokenizer, max_prompt_tokens=4, max_reply_tokens=4)
    assert len(exact.pairs[0].prompt_ids) == 4
    assert exact.cut_prompts == 0


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_limits_hold_at_their_smallest(limit: int, tokenizer: Any) -> None:
    found = render_pairs(
        [Pair("abcdefgh", "xxx", "yyy")], with_bos(tokenizer), max_prompt_tokens=limit, max_reply_tokens=limit
    )
    (rendered,) = found.pairs
    assert [len(ids) for ids in (rendered.prompt_ids, rendered.chosen_ids, rendered.rejected_ids)] == [limit] * 3


def test_pairs_that_a_cut_makes_equal_are_left_out(tokenizer: Any) -> None:
    pairs = [pair("a", "same start, then this", "same start, then that"), pair("b", "yes", "no")]
    found = render_pairs(pairs, tokenizer, max_prompt_tokens=50, max_reply_tokens=6)
    assert (len(found.pairs), found.indistinct) == (1, 1)
    with pytest.raises(InputError, match="none of the 1 pairs differ within the first 6 tokens") as refusal:
        render_pairs(pairs[:1], tokenizer, max_prompt_tokens=50, max_reply_tokens=6)
    assert "training.max_reply_tokens" in refusal.value.fix
    assert render_pairs([], tokenizer, max_prompt_tokens=5, max_reply_tokens=5).pairs == []


def test_messages_need_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="the base's tokenizer has no chat template") as refusal:
        chat_ids(tokenizer, chat("hi"))
    assert "instruction-tuned" in refusal.value.fix


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages[0].x.y }}", "{% if %}"]
)
def test_a_template_that_refuses_names_the_turns(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="cannot render the turns 'user assistant'"):
        chat_ids(tokenizer, chat("hi", "ho"))


def test_special_tokens_are_not_added_to_what_a_template_wrote(tokenizer: Any) -> None:
    assert chat_ids(with_bos(tokenizer), chat("hi"))[0] == USER


@pytest.mark.parametrize(
    ("first", "second", "length"), [([1, 2, 3], [1, 2, 4], 2), ([1], [1, 2], 1), ([], [1], 0), ([2], [1], 0)]
)
def test_common_prefix(first: list[int], second: list[int], length: int) -> None:
    assert common_prefix(first, second) == length
