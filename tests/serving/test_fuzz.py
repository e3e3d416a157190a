"""The API against its own description: whatever fits it or nearly does gets an answer that the description knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import CHECKS

from lora_prefvec.serving.app import create_app
from lora_prefvec.serving.settings import Settings
from tests.serving.puppet import Puppet

app = create_app(Puppet(), Settings(presets={"kind": {"helpful": 1.0}}, reply_seconds=2))
schema = schemathesis.openapi.from_asgi("/openapi.json", app)
seen: Counter[tuple[str, int]] = Counter()


@schema.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Mostly a model that exists and vectors that do: what comes after them is to be fuzzed too."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 4:
        body["model"] = "puppet"
        if isinstance(mix := body.get("preferences"), dict) and len(mix) % 3:
            body["preferences"] = dict(zip(("helpful", "harmless"), mix.values(), strict=False))
    return body


@pytest.fixture(scope="module", autouse=True)
def everything_was_met() -> Iterator[None]:
    yield
    met = {route for route, _ in seen}  # test processes may share the routes out
    assert met
    for route in met & {"/v1/chat/completions", "/v1/completions"}:
        assert min(seen[route, status] for status in (200, 400, 404)) > 0, seen
    assert seen["/v1/models/{model}", 404] or "/v1/models/{model}" not in met


@schema.parametrize()
@hypothesis.settings(max_examples=80, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_fuzz(case: schemathesis.Case) -> None:
    response = case.call()
    seen[case.operation.path, response.status_code] += 1
    # What fits the schema may still be refused: fields that do not go together, unknown vectors, limits.
    case.validate_response(response, excluded_checks=[CHECKS.get_one("positive_data_acceptance")])
