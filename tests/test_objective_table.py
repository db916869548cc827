"""The table of objectives agrees with the formulas, the kernels, the options and the tests."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

import test_kernels
import test_objectives
from taid import TAIDConfig, objectives
from taid.losses import kernels
from taid.losses.kernels import torch_rows
from taid.losses.objective_table import OBJECTIVES, ObjectiveName

COMPARED = [name for name in OBJECTIVES if name != "sft"]


def keyword_only(name):
    signature = inspect.signature(getattr(objectives, name))
    return {p.name: p.default for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}


def test_the_type_and_the_formulas_have_the_names_of_the_table():
    assert get_args(ObjectiveName) == tuple(OBJECTIVES)
    assert set(objectives.__all__) == {*COMPARED, "interpolated_log_probs"}


@pytest.mark.parametrize("name", COMPARED)
def test_an_entry_names_all_parameters_of_its_function(name):
    entry = OBJECTIVES[name]
    assert set(keyword_only(name)) == {*entry.parameters, *([entry.moves] if entry.moves else [])}
    assert entry.needs_labels == ("labels" in inspect.signature(getattr(objectives, name)).parameters)


@pytest.mark.parametrize("name", COMPARED)
def test_an_option_has_the_default_of_its_parameter(name):
    defaults = {field.name: field.default for field in fields(TAIDConfig)}
    entry = OBJECTIVES[name]
    assert set(entry.options) <= set(defaults)
    given = keyword_only(name)
    assert {p: defaults[option] for p, option in entry.parameters.items()} == {p: given[p] for p in entry.parameters}


def test_rows_c_has_the_order_of_the_table():
    source = Path(kernels.__file__).with_name("rows.c").read_text(encoding="utf-8")
    names = re.sub(r"//[^\n]*", "", re.search(r"enum \{(.*?)\}", source, re.DOTALL).group(1)).lower()
    assert re.findall(r"\w+", names) == [*OBJECTIVES, "mixture_taid"]


def test_each_objective_has_its_gradient_in_plain_torch_and_is_tested_in_all_forms():
    assert set(torch_rows._GRADIENTS) == set(COMPARED)
    assert set(test_kernels.REFERENCES) == {case.objective for case in test_kernels.CASES.values()} == set(OBJECTIVES)
    assert {re.match(r"\w+", name).group() for name in test_objectives.CASES} >= set(COMPARED)
