"""Pictures are written whole, as PNG, whatever there is to draw."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_prefvec.errors import InputError
from lora_prefvec.evaluation import control_plot, curve, front_plot
from lora_prefvec.evaluation.plots import are_shares, draw_curve, draw_front, draw_table, picture, pyplot
from lora_prefvec.evaluation.slices import table
from tests.evaluation.points import MEANS, swept

pytest.importorskip("matplotlib")
GRID = {"helpful": "-1:1:1", "harmless": "-1:1:1"}


def is_png(content: bytes) -> bool:
    return content.startswith(b"\x89PNG\r\n") and len(content) > 5000


def test_plots_are_pngs_and_replace_older_ones(tmp_path: Path) -> None:
    control, plotted = tmp_path / "control.png", tmp_path / "front.png"
    control.write_text("older")
    summary = swept(**GRID)
    control_plot(control, [curve(summary, "helpful"), curve(summary, "harmless")])
    front_plot(plotted, summary)
    assert is_png(control.read_bytes())
    assert is_png(plotted.read_bytes())
    assert {file.name for file in tmp_path.iterdir()} == {"control.png", "front.png"}


def test_an_axis_without_a_say_leaves_a_gap() -> None:
    silent = {**MEANS, "harmless": lambda mix: None if mix["helpful"] > 0 else 0.5, "reward": lambda _: None}
    summary = swept(means=silent, **GRID)
    found = curve(summary, "helpful")
    _, panel = pyplot().subplots()
    draw_curve(panel, found, list(found.scores))
    lines = {line.get_label(): line for line in panel.get_lines()}
    assert list(lines["harmless"].get_xdata()) == [-1, 0]
    assert "reward" not in lines
    assert is_png(picture(draw_front, summary, "helpful", "harmless"))
    assert is_png(picture(draw_table, table(summary, "helpful", "harmless"), "harmless", 1))


def test_lines_are_told_apart_without_colour() -> None:
    _, panel = pyplot().subplots()
    found = curve(swept(**GRID), "helpful")
    draw_curve(panel, found, list(found.scores))
    styles = {
        (line.get_marker(), str(line.get_linestyle())) for line in panel.get_lines() if line.get_label()[0] != "_"
    }
    assert len(styles) == len(found.scores)


def test_cells_hold_their_numbers_and_many_get_level_lines() -> None:
    _, panel = pyplot().subplots()
    draw_table(panel, table(swept(**GRID), "helpful", "harmless"), "helpful", 1)
    texts = [text.get_text() for text in panel.texts]
    assert sum("." in text for text in texts) == 9
    assert "1" in texts  # the number of a mix of the front
    _, panel = pyplot().subplots()
    draw_table(panel, table(swept(helpful="-1:1:0.1", harmless="-1:1:0.1"), "helpful", "harmless"), "reward", 1)
    assert any(float(text.get_text().replace("\u2212", "-")) > -3 for text in panel.texts if "." in text.get_text())


def test_matplotlib_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'lora-prefvec\[plots\]'"):
        picture(draw_front, swept(**GRID), "helpful", "harmless")


@pytest.mark.parametrize(
    ("means", "shares"),
    [([0, 1], True), ([0, 0.2], True), ([0, 0], True), ([0.01, 0.05], False), ([0.5, 1.2], False), ([-1, 0], False)],
)
def test_what_is_drawn_from_0_to_1(means: list[float], shares: bool) -> None:
    assert are_shares(means) is shares
