"""What a configuration, a module or a graph tells of processors and edges, whatever is in it."""

from types import SimpleNamespace
from typing import Any

import pytest

from _anemoi_ckpt import configurations
from _anemoi_ckpt.graphs import read_graph
from _anemoi_ckpt.methods import Processor, compared


def configured(**config: Any) -> list[Processor]:
    section = {"_target_": "anemoi.models.preprocessing.remapper.Remapper", "config": config}
    data = {"d": "none", "v": "tp", "loop": ["${data.loop}"], "kind": "text"}
    datasets = {"data": {"processors": {"one": section}}}
    return configurations._processors(({"data": {**data, "datasets": datasets}},), "data")


def test_references_in_a_configuration_are_followed_at_any_depth() -> None:
    (found,) = configured(default="${data.d}", sqrt=["${data.v}"], method_kwargs={"sqrt": None})
    assert found == Processor("Remapper", "none", {"tp": "sqrt"}, {"sqrt": None})
    assert (found.step("tp"), found.step("z")) == ("Remapper sqrt", "")


@pytest.mark.parametrize(
    "reference", ["${data.nothing}", "x_${data.v}", ["${data.nothing}"], "${data.loop}"]
)
def test_processors_with_references_that_cannot_be_followed_are_unknown(reference: Any) -> None:
    assert configured(default="none", sqrt=reference) == []


def test_options_that_are_none_are_left_out() -> None:
    (found,) = configured(default="sqrt", method_kwargs="${data.kind}")
    assert (found.options, found.step("z")) == ({}, "Remapper sqrt")


def test_equal_numbers_are_equal_options() -> None:
    one, same, other = (
        [Processor("Remapper", "power", {}, {"power": {"pow": value, "by": "x"}})]
        for value in (1, 1.0, 2)
    )
    assert compared(one, same, ["tp"]) == {}
    assert compared(one, other, ["tp"]) == {
        "tp": (["Remapper power by=x pow=1"], ["Remapper power by=x pow=2"])
    }


def test_processors_of_another_kind_tell_nothing() -> None:
    known = SimpleNamespace(methods={"tp": "sqrt"}, default="none", method_kwargs=None)
    for other in (SimpleNamespace(methods={}), SimpleNamespace(default="none", methods=["sqrt"])):
        assert [configurations._has_methods(each) for each in (known, other)] == [True, False]
    assert configurations._processor(known).options == {}


@pytest.mark.parametrize(
    "graph",
    [
        SimpleNamespace(_edge_store_dict=3),
        SimpleNamespace(_edge_store_dict=None),
        SimpleNamespace(_edge_store_dict={"e": SimpleNamespace(_mapping=["edge_index"])}),
        SimpleNamespace(),
    ],
)
def test_a_graph_of_another_class_tells_nothing(graph: Any) -> None:
    assert read_graph({"hyper_parameters": {"graph_data": graph}}) == ()
