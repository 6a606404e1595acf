"""Which metrics share a chart, and what the drawings are made of."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from rlhf.report.charts import CHARTS, Chart, Marks, draw, is_noisy, moving_average, plan, thin

LOSS = CHARTS[0]


def elements(svg: str, name: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if e.tag.rpartition("}")[2] == name]


def test_plan_groups_related_metrics():
    planned, others = plan(["train/loss", "train/lr", "eval/loss", "policy/lr", "my/own", "reward/score_mean"])
    found = {each.chart.title: each.names for each in planned}
    assert found == {
        "Loss": ["train/loss", "eval/loss"],
        "Reward": ["reward/score_mean"],
        "Learning rate": ["train/lr", "policy/lr"],
    }
    assert others == ["my/own"]


def test_plan_leaves_out_what_only_repeats():
    planned, others = plan(["reward/score_mean", "reward/model"])
    assert [each.chart.title for each in planned] == ["Reward"] and others == []
    planned, _ = plan(["reward/score_mean", "reward/model", "reward/numeric"])
    assert planned[1].names == ["reward/model", "reward/numeric"]


def test_plan_takes_every_metric_once():
    names = ["rollout/kl_ref", "policy/kl_ref", "reward/score_std", "reward/unscored", "reward/flat_groups", "value/lr"]
    planned, others = plan(names)
    assert sorted([name for each in planned for name in each.names] + others) == sorted(names)


def test_drawing_is_one_svg_that_fetches_nothing():
    svg = draw(LOSS, {"train/loss": [(1, 3.0), (2, 2.5)], "eval/loss": [(2, 2.6)]}, "sft")
    assert svg.startswith('<svg role="img" aria-label="Loss"')
    root = ElementTree.fromstring(svg)
    assert "width" not in root.attrib and "viewBox" in root.attrib
    assert not elements(svg, "image") and not elements(svg, "script") and not elements(svg, "style")
    urls = set(re.findall(r"https?://[^\"\s]+", svg))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of standards only"
    texts = [element.text for element in elements(svg, "text")]
    assert "train" in texts and "eval" in texts and "nats" in texts and "step" in texts


def test_drawing_is_reproducible_and_ids_are_its_own():
    curves = {"train/loss": [(1, 3.0), (2, 2.5)]}
    first, second = draw(LOSS, curves, "sft"), draw(LOSS, curves, "rm")
    assert draw(LOSS, curves, "sft") == first
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1], "two drawings in one page must not share ids"
    assert set(re.findall(r'href="#([^"]+)"', first)) <= ids[0]


def test_gaps_alarms_and_targets_are_marked():
    curves = {"train/loss": [(1, 3.0), (5, 2.5)]}
    red, amber, dashed = "#dc2626", "#d97706", "stroke-dasharray"
    svg = draw(LOSS, curves, "sft", Marks(gaps=[3], alarms=[2, 4], level=2.75))
    assert (svg.count(red), svg.count(amber), svg.count(dashed)) == (1, 2, 1)
    plain = draw(LOSS, curves, "sft")
    assert not any(mark in plain for mark in (red, amber, dashed))


def test_alarms_are_no_curves():
    planned, others = plan(["alarm/kl_spike", "rollout/kl_ref", "my/own"])
    assert [each.names for each in planned] == [["rollout/kl_ref"]] and others == ["my/own"]


def test_test_scores_have_charts_of_their_own():
    names = ["test/score_mean", "test/model", "test/train_shift", "test/shift", "test/gap"]
    planned, others = plan(names)
    assert [each.names for each in planned] == [["test/score_mean"], ["test/train_shift", "test/shift"], ["test/gap"]]
    assert planned[2].chart.against_distance and others == []
    planned, _ = plan([*names, "test/numeric"])
    assert ["test/model", "test/numeric"] in [each.names for each in planned], "parts, where there are several"


def test_names_from_files_cannot_become_markup_or_formulas():
    name = 'x"><script>$\\frac$'
    svg = draw(Chart(name, (), ""), {name: [(1, 1.0)], f"b/{name}": [(1, 2.0)]}, "sft")
    assert "<script>" not in svg
    ElementTree.fromstring(svg)


@pytest.mark.parametrize("values", [[0.0], [1.0] * 5, [1e-12, 2e-12], [1e29, -1e29], [0.0, 1e-300]])
def test_odd_ranges_can_be_drawn(values):
    series = list(enumerate(values))
    ElementTree.fromstring(draw(LOSS, {"train/loss": series}, "sft"))
    ElementTree.fromstring(draw(Chart("Gradient norm", (), "", log=True), {"train/grad_norm": series}, "sft"))


def test_points():
    svg = draw(Chart("x", (), "", points=True), {"ppo": [(0.0, 1.0), (3.0, 2.0)]}, "sft", x_label="nats")
    assert "nats" in [element.text for element in elements(svg, "text")]


def test_moving_average():
    assert moving_average([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]
    assert moving_average([1.0], 3) == [1.0]


def test_only_restless_curves_are_smoothed():
    assert is_noisy([float(i % 2) for i in range(60)])
    assert not is_noisy([float(i % 2) for i in range(20)]), "short enough to be read as it is"
    assert not is_noisy([i * i / 7 for i in range(60)])


def test_thin_keeps_spikes_and_order():
    series = [(step, 1.0) for step in range(10_000)]
    series[7777] = (7777, 50.0)
    kept = thin(series)
    assert len(kept) <= 800 and (7777, 50.0) in kept
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert thin(series[:800]) == series[:800]
