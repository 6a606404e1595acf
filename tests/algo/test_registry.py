"""The registry refuses what would make a choice ambiguous or anonymous."""

from __future__ import annotations

import pytest

from rlhf.algo.registry import Registry


def double(x: float) -> float:
    """Twice x.

    Not more.
    """
    return 2 * x


def test_an_entry_knows_its_function_and_where_it_comes_from() -> None:
    registry = Registry("thing")
    assert registry.register("double", paper="arXiv:0000.00000 eq. 1")(double) is double
    entry = registry["double"]
    assert (entry.name, entry.function, entry.paper) == ("double", double, "arXiv:0000.00000 eq. 1")
    assert entry.summary == "Twice x."
    assert entry.inputs == ("x",)
    assert registry.names() == ["double"] and list(registry) == [entry]


def test_inputs_are_the_positional_parameters_in_order() -> None:
    def weigh(scores: float, mask: float, *, eps: float, unbiased: bool) -> float:
        """A weight."""
        return scores * mask * eps * unbiased

    registry = Registry("thing")
    registry.register("weigh", paper="a paper")(weigh)
    assert registry["weigh"].inputs == ("scores", "mask")


def test_a_name_is_taken_once() -> None:
    registry = Registry("thing")
    registry.register("double", paper="a paper")(double)
    with pytest.raises(ValueError, match="'double' is registered twice"):
        registry.register("double", paper="a paper")(double)


def test_an_entry_needs_a_paper_and_a_docstring() -> None:
    with pytest.raises(ValueError, match="needs a paper and a docstring"):
        Registry("thing").register("double", paper=" ")(double)
    with pytest.raises(ValueError, match="needs a paper and a docstring"):
        Registry("thing").register("nameless", paper="a paper")(lambda x: x)


def test_an_unknown_name_lists_the_known_ones() -> None:
    registry = Registry("thing")
    registry.register("double", paper="a paper")(double)
    with pytest.raises(KeyError, match="no thing 'triple'; there are double"):
        registry["triple"]
