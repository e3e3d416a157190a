"""Many questions to a language model behind an OpenAI-compatible endpoint: side by side, patiently, each only once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_prefvec.errors import InputError, PrefvecError, RunError, require_extra
from lora_prefvec.evaluation.scorers.protocol import Message

if TYPE_CHECKING:
    import httpx

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LONGEST_WAIT = 300.0  # seconds; an endpoint that asks for more is given up
TOLD = 300  # characters of an endpoint's complaint


@dataclass(frozen=True)
class Endpoint:
    """A model behind a URL; answers are kept in `cache` under the hash of all that they follow from.

    Args:
        url: what `/chat/completions` is appended to: `https://api.openai.com/v1`.
        key: sent as a bearer token; never shown, in errors neither.
        temperature, max_tokens: None leaves the field out, for models that refuse it.
        timeout: seconds for one answer.
        attempts: at one question, the first included, while the endpoint is busy, slow or down.
        backoff: seconds before the second attempt, doubled for each further one, up to 30; `Retry-After` counts first.
        concurrency: questions at once.
    """

    url: str
    model: str
    cache: Path
    key: str | None = field(default=None, repr=False)
    temperature: float | None = 0.0
    max_tokens: int | None = 512
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0
    concurrency: int = 8

    def ask(self, questions: Sequence[list[Message]], readable: Callable[[str], bool]) -> list[str]:
        """The answers to questions, from the cache where they were given before.

        Args:
            readable: whether an answer is one; others are returned too, and not kept.

        Raises:
            InputError: the endpoint refuses a question.
            RunError: it cannot be reached, stays busy, or answers no chat completions.
        """
        try:
            import httpx
        except ImportError:
            raise require_extra("httpx", "eval") from None
        answers: dict[str, str] = {}
        open_questions = {}
        for question in questions:
            key = self._key(question)
            if (kept := self._kept(key)) is None:
                open_questions[key] = question
            else:
                answers[key] = kept
        stop = threading.Event()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with (
            httpx.Client(headers=headers, timeout=self.timeout) as client,
            ThreadPoolExecutor(self.concurrency) as threads,
        ):
            jobs = {threads.submit(self._answer, client, asked, stop): key for key, asked in open_questions.items()}
            try:
                for job in as_completed(jobs):
                    answers[jobs[job]] = answer = job.result()
                    if readable(answer):
                        self._keep(jobs[job], answer)
            finally:  # an error, Ctrl-C: what is not asked yet is not paid for
                stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
        return [answers[self._key(question)] for question in questions]

    @property
    def identity(self) -> list[Any]:
        """What its answers depend on beside the question."""
        return [self.url, self._body([])]

    def cost(self, questions: Sequence[list[Message]], *, written: bool = True) -> str:
        """What asking would cost, in calls and tokens; a token is taken for four characters.

        Args:
            written: whether the replies stand in the questions; if not, each is taken for another one.
        """
        unasked = list(questions)
        if written:
            keys = {self._key(question): question for question in questions}
            unasked = [question for key, question in keys.items() if self._kept(key) is None]
        calls = f"{'' if written else 'at most '}{len(unasked)} call{'' if len(unasked) == 1 else 's'}"
        tokens = sum(len(message["content"]) for asked in unasked for message in asked) // 4
        beside = "" if written else " beside the replies"
        limit = f"at most {len(unasked) * self.max_tokens} out" if self.max_tokens else "no limit on those out"
        return f"{calls} of {self.model} at {self.url}: about {tokens} tokens in{beside}, {limit}"

    def _body(self, question: list[Message]) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": question,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _answer(self, client: httpx.Client, question: list[Message], stop: threading.Event) -> str:
        """One answer, asked for as often as is worth while."""
        import httpx

        for attempt in range(1, self.attempts + 1):
            if stop.is_set():
                raise RunError("stopped")
            wait = min(self.backoff * 2 ** (attempt - 1), 30.0) * random.uniform(0.5, 1.0)
            try:
                response = client.post(f"{self.url}/chat/completions", json=self._body(question))
            except httpx.TimeoutException:
                trouble = f"did not answer within {self.timeout:g} s"
            except httpx.TransportError as error:
                trouble = f"cannot be reached ({type(error).__name__})"
            except httpx.InvalidURL as error:
                raise InputError(f"{self.url!r} is no URL: {error}", "Write http://HOST:PORT/v1.") from None
            else:
                if response.status_code == 200:
                    return self._text(response)
                trouble = f"answers {response.status_code}: {self._complaint(response)}"
                if response.status_code not in RETRIED:
                    raise InputError(f"the judge at {self.url} {trouble}", "Look at its URL, its model and its key.")
                wait = max(wait, _retry_after(response))
            if attempt < self.attempts:
                if wait > LONGEST_WAIT:
                    raise RunError(
                        f"the judge at {self.url} asks to wait {wait:.0f} s", "Go on later: what it answered is kept."
                    )
                stop.wait(wait)
        raise RunError(
            f"the judge at {self.url} {trouble}, {self.attempts} times", "Go on later: what it answered is kept."
        )

    def _text(self, response: httpx.Response) -> str:
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise RunError(
                f"the judge at {self.url} answers no chat completion: {self._complaint(response)}",
                "The URL must be what /chat/completions is appended to, such as http://HOST:PORT/v1.",
            ) from None
        return text if isinstance(text, str) else ""  # nothing said: a refusal, or all tokens spent on thinking

    def _complaint(self, response: httpx.Response) -> str:
        try:
            text = str(response.json()["error"]["message"])
        except (ValueError, LookupError, TypeError):
            text = response.text
        return (text.replace(self.key, "***") if self.key else text)[:TOLD]

    def _key(self, question: list[Message]) -> str:
        asked = json.dumps([self.url, self._body(question)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def _kept(self, key: str) -> str | None:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            answer = json.loads((self.cache / f"{key}.json").read_text(encoding="utf-8"))["answer"]
            return answer if isinstance(answer, str) else None
        return None

    def _keep(self, key: str, answer: str) -> None:
        from lora_prefvec.artifact import atomic_file

        # A cache that cannot be written costs money, not the run.
        with contextlib.suppress(OSError, PrefvecError), atomic_file(self.cache / f"{key}.json", force=True) as file:
            file.write_text(json.dumps({"model": self.model, "answer": answer}), encoding="utf-8")


def judge_cache() -> Path:
    """`$PREFVEC_CACHE`, or lora-prefvec in the user's cache folder; its `judge` part."""
    chosen = os.environ.get("PREFVEC_CACHE")
    home = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lora-prefvec"
    return home / "judge"


def _retry_after(response: httpx.Response) -> float:
    """Seconds that `Retry-After` asks for, as a number or as a date; 0 where it asks for none."""
    value = response.headers.get("Retry-After", "")
    with contextlib.suppress(ValueError):
        return max(float(value), 0.0)
    with contextlib.suppress(ValueError, TypeError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return 0.0
