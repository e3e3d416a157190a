"""What the API's description says of streams, which fuzzing meets only now and then."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.test_fuzz import schema


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_every_event_of_a_stream_is_as_described(route: str) -> None:
    asked: dict[str, Any] = {"prompt": "hi"}
    if "chat" in route:
        asked = {"messages": [{"role": "user", "content": "hi"}]}
    case = schema[route]["POST"].Case(body={"model": "puppet", "stream": True, **asked}, media_type="application/json")
    response = case.call()
    assert response.headers["content-type"] == ["text/event-stream; charset=utf-8"]
    case.validate_response(response)
