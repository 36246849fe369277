"""Figures: what is drawn, where, and what is left out of large pools."""

import html

import numpy as np

from phatgoose.analysis.figures import dataset_matrix, heat_maps, svg_of, write_png
from routing_samples import make_profile, names_of


def image_of(axes):
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


def labels_of(axes, which="y"):
    return [label.get_text() for label in getattr(axes, f"get_{which}ticklabels")()]


def test_heat_maps_have_experts_down_layers_across_and_the_oracle_beside():
    profile = make_profile(4, ("encoder", "decoder"), layers=3)
    figure = heat_maps({"a": profile, "b": profile}, oracle={"a": "paws", "b": "qasc"})
    panels = [axes for axes in figure.axes if axes.get_images()][:6]
    assert labels_of(panels[0]) == list(names_of(4))
    assert [axes.get_xlabel() for axes in panels[:3]] == ["encoder layer", "decoder layer", ""]
    for stack, panel in zip(("encoder", "decoder"), panels[:2], strict=True):
        for layer in range(3):
            wanted = profile.by_layer()[f"{stack} {layer}"]
            np.testing.assert_allclose(image_of(panel)[:, layer], wanted)
    assert image_of(panels[2])[:, 0].tolist() == [0, 0, 1, 0]
    assert image_of(panels[5])[:, 0].tolist() == [0, 0, 0, 1]
    assert labels_of(panels[2], "x") == ["Oracle"]


def test_large_pools_show_the_most_used_experts_and_say_so():
    profile = make_profile(166, layers=4)
    chosen = names_of(166)[17]
    figure = heat_maps({"a": profile}, oracle={"a": chosen})
    labels = labels_of(figure.axes[0])
    assert len(labels) == 40
    assert labels == sorted(labels)  # in the pool's order
    assert chosen in labels
    left = profile.whole()[[z for z, name in enumerate(names_of(166)) if name not in labels]].sum()
    assert f"126 experts with {left:.0%}" in figure.axes[0].get_ylabel()


def test_names_of_others_are_no_formulas_and_no_markup(tmp_path):
    """Two dollars made matplotlib read what lies between them, and refuse it."""
    name = r"a $\nothing$ & <it>"
    drawn = [
        heat_maps({name: make_profile(2, layers=2)}),
        dataset_matrix({name: np.array([0.5, 0.5])}, [name, "other"]),
    ]
    for figure in drawn:
        write_png(figure, tmp_path / "figure.png")
        svg = svg_of(figure, "a", name)
        assert f'aria-label="{html.escape(name)}"' in svg
        assert "<it>" not in svg
        assert "currentColor" in svg  # the page's
