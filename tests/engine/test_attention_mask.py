"""Which columns a step sees: the definition of the mask, token by token."""

import pytest
import torch

from tests import tiny
from vila.core.errors import ConfigError
from vila.engine.attention_mask import CachePositions, check_attention

CPU = torch.device("cpu")


def phases(*counts):
    """CachePositions of two rows after these phases, and the positions that each row really has, None for padding."""
    columns = CachePositions(2, 40, CPU)
    places = [[], []]
    for phase in counts:
        positions = columns.append(phase)
        for row, count in enumerate(phase):
            known = sum(place is not None for place in places[row])
            assert positions[row, :count].tolist() == list(range(known, known + count))
            places[row] += [*range(known, known + count), *[None] * (max(phase) - count)]
    return columns, places


def allowed(places, query, window):
    """CachePositions that the token in column `query` sees, written out."""
    if places[query] is None:
        return None
    first = 0 if window is None else places[query] - window + 1
    return [k for k, place in enumerate(places) if place is not None and first <= place <= places[query]]


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(
    "counts", [[(3, 5)], [(1, 0)], [(2, 0), (4, 6)], [(1, 0), (2, 3), (1, 1), (1, 1)], [(5, 2), (1, 1)]]
)
def test_a_query_sees_the_real_tokens_before_it_within_the_window(counts, window):
    columns, places = phases(*counts)
    width = max(counts[-1])
    mask = columns.mask(width, window)
    for row in range(2):
        for number in range(width):
            query = len(places[row]) - width + number
            line = mask[row, 0, min(number, mask.shape[2] - 1)]
            wanted = allowed(places[row], query, window)
            if wanted is not None:
                assert line.nonzero()[:, 0].tolist() == wanted
            else:
                assert line[query], "padding sees itself, or its numbers would spoil the row"


def test_without_padding_there_is_no_mask():
    columns, _ = phases((3, 3), (1, 1))
    assert columns.mask(1) is None
    assert columns.masks(1, tiny.text_config("mistral", sliding_window=4)) is None


def test_the_mask_goes_when_the_padded_rows_have_left():
    columns, _ = phases((3, 5), (1, 1))
    columns.select(torch.tensor([1]))
    assert columns.mask(1) is None
    columns, _ = phases((3, 5), (1, 1))
    columns.select(torch.tensor([0]))
    assert columns.mask(1).tolist() == [[[[True, True, True, False, False, True]]]]


def test_layers_of_two_kinds_have_two_masks():
    columns, _ = phases((3, 5), (1, 1))
    facts = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}
    masks = columns.masks(1, tiny.text_config("qwen2", **facts))
    assert masks["full_attention"][0].tolist() == [[[True, True, True, False, False, True]]]
    assert masks["sliding_attention"][0].tolist() == [[[False, False, True, False, False, True]]]


def test_layers_of_an_unknown_kind_are_refused():
    config = tiny.text_config("qwen2", layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ConfigError, match="layers with linear_attention: only full and sliding"):
        check_attention(config)
