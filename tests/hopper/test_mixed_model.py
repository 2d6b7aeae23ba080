"""The mixed decode kernel's fragments: every element where the other operand expects it, and no bank conflict."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import mixed_fragments as model

HEAD_DIMS = (64, 128, 256)


@pytest.fixture(params=HEAD_DIMS, ids=str)
def layout(request: pytest.FixtureRequest) -> model.Layout:
    return model.Layout(request.param)


def block(layout: model.Layout) -> np.ndarray:
    """A number for each element of a block of keys or values."""
    return np.arange(model.KEYS * layout.head_dim).reshape(model.KEYS, layout.head_dim)


def key_at(place: int) -> int:
    """The key at a place of the block, as both products take them."""
    return place // 8 * 8 + model.key_of_row(place % 8)


def test_the_keys_columns_meet_those_of_the_queries(layout: model.Layout) -> None:
    rows = block(layout)
    operand = model.key_operand(model.as_loaded(rows, layout), layout)
    columns = model.query_columns(layout)
    assert sorted(columns) == list(range(layout.head_dim))
    for place in range(model.KEYS):
        assert operand[place].tolist() == rows[key_at(place), columns].tolist()


def test_the_values_rows_are_the_results_columns(layout: model.Layout) -> None:
    rows = block(layout)
    operand = model.value_operand(model.as_loaded(rows, layout), layout)
    keys = [key_at(place) for place in range(model.KEYS)]
    seen = []
    for panel in range(layout.panels):
        for row in range(64):
            column = model.column_of(layout, panel, row)
            seen.append(column)
            assert operand[panel, row].tolist() == rows[keys, column].tolist()
    assert sorted(seen) == list(range(layout.head_dim))


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_loads_have_no_bank_conflict(layout: model.Layout, kind: str) -> None:
    assert model.banks(layout, kind) == 1


def test_the_swizzle_is_the_copy_engines(layout: model.Layout) -> None:
    rows = block(layout)
    tile = model.as_loaded(rows, layout)
    for row in range(model.KEYS):
        for piece in range(layout.head_dim // 16):
            address = layout.place_of_piece(row, piece)
            assert tile[address : address + 16].tolist() == rows[row, piece * 16 : piece * 16 + 16].tolist()
