"""What the figures of several experiments share."""

import numpy as np
from matplotlib.colors import to_hex

from experiments import figures


def test_one_legend_has_each_label_once():
    figure, (left, right) = figures.panels(2)
    left.plot([0, 1], label="ours")
    right.plot([0, 1], label="ours")
    right.plot([0, 1], label="theirs")
    right.plot([0, 1], label="_nolegend_")
    figures.legend_below(figure, 2)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "theirs"]


def test_seeds_are_dots_above_their_name():
    _, (ax,) = figures.panels(1)
    for place, values in enumerate(([1, "nan", 2], 3.0)):
        figures.dots(ax, place, values)
    figures.names_below(ax, ["a", "b"])
    assert [line.get_xdata().tolist() for line in ax.lines] == [[0, 0, 0], [1]]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1, np.nan, 2])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]


def test_a_band_from_the_least_to_the_largest_seed_lies_around_the_mean():
    _, (ax,) = figures.panels(1)
    figures.mean_and_range(ax, [10, 20], [[1, 2, 6], 5.0], "o--", color=figures.SKY, label="ours")
    (line,), (band,) = ax.lines, ax.collections
    np.testing.assert_array_equal(line.get_xydata(), [[10, 3], [20, 5]])
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(10, 1), (10, 6), (20, 5)}
    assert line.get_color() == figures.SKY
    assert to_hex(band.get_facecolor()[0]) == figures.SKY


def test_failed_seeds_of_a_sweep_are_crosses_at_the_top_and_count_in_the_median():
    _, (ax,) = figures.panels(1)
    figures.sweep(ax, {"1": [1.0, 2.0, 3.0], "2": [10.0, np.nan, np.nan]}, xlabel="P", ylabel="distance")
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(lines["median"].get_ydata(), [2, 11])
    crosses = [line.get_xydata() for line in ax.lines if line.get_marker() == "x"]
    np.testing.assert_allclose(np.concatenate(crosses), [[1, 11]] * 2)
