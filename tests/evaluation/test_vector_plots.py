"""Pictures of vectors are drawn for every kind of vector, and say what they show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lora_prefvec.errors import InputError
from lora_prefvec.evaluation import plot_vectors
from lora_prefvec.evaluation.plots import pyplot
from lora_prefvec.evaluation.vector_plots import draw_cosines, draw_energy, draw_norms, draw_spectrum
from lora_prefvec.vector import LowRankDelta, PreferenceVector, layer_cosines, norm_grid


def vector(seed: int, layers: int = 3, rank: int = 2) -> PreferenceVector:
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in ("q_proj", "up_proj")]
    return PreferenceVector(
        {
            name: LowRankDelta(torch.randn(rank, 5, generator=generator), torch.randn(6, rank, generator=generator))
            for name in [*names, "lm_head"]
        }
    )


def test_a_folder_gets_a_picture_each_and_keeps_its_other_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "norms.png").write_text("older")
    (tmp_path / "other").write_text("")
    files = plot_vectors(tmp_path, {"a/helpful": vector(0), "b/harmless": vector(1, layers=2, rank=3)})
    assert [file.name for file in files] == ["norms.png", "energy.png", "spectrum.png", "cosines.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert (tmp_path / "other").exists()
    assert len(plot_vectors(tmp_path / "one", {"helpful": vector(0)})) == 3
    many = plot_vectors(tmp_path / "many.png", {f"v{i}": vector(i) for i in range(5)})
    assert many == [tmp_path / "many.png"]


def test_what_is_drawn_is_what_was_measured() -> None:
    pytest.importorskip("matplotlib")
    plt = pyplot()
    v = vector(0)
    figure = plt.figure()
    draw_norms(figure, {"helpful": norm_grid(v)})
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (3, 4)
    assert float((image.filled(0.0) ** 2).sum()) == pytest.approx(v.norm() ** 2)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["q_proj", "up_proj", "lm_head"]
    assert "helpful" in figure.axes[0].get_title()
    panels = plt.subplots(1, 3)[1]
    draw_energy(panels[0], {"all": [delta.spectrum() for delta in v.deltas.values()]})
    assert panels[0].lines[0].get_ydata()[-1] == pytest.approx(100)
    draw_spectrum(panels[1], {"all": [delta.spectrum() for delta in v.deltas.values()]})
    assert float((panels[1].lines[0].get_ydata() ** 2).sum()) * 7 == pytest.approx(v.norm() ** 2)
    pair = {"helpful": v, "against": -v}
    draw_cosines(panels[2], pair, layer_cosines(list(pair.values())))
    assert panels[2].lines[0].get_ydata() == pytest.approx([-1.0] * 4)
    plt.close("all")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = PreferenceVector({"a": LowRankDelta(torch.ones(1, 2), torch.zeros(3, 1))})
    for nothing in (zero, PreferenceVector({})):
        with pytest.raises(InputError, match=r"nothing to draw"):
            plot_vectors(tmp_path / "x", {"zero": nothing})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"lora-prefvec\[plots\]"):
        plot_vectors(tmp_path / "x", {"a": vector(0)})
    assert list(tmp_path.iterdir()) == []
