"""Media reach their slots, and the mask says who sees whom."""

import pytest
import torch

from vila.model.modeling import cached_mask, merge_image_embeddings, segment_mask


def test_media_vectors_fill_their_slots_in_reading_order():
    embeds = torch.zeros(2, 3, 2)
    slots = torch.tensor([[False, True, True], [True, False, False]])
    out = merge_image_embeddings(embeds, torch.arange(1.0, 7.0).view(3, 1, 2), slots)
    assert out.tolist() == [[[0, 0], [1, 2], [3, 4]], [[5, 6], [0, 0], [0, 0]]]


def test_gradients_reach_text_and_media():
    embeds = torch.zeros(1, 2, 2, requires_grad=True)
    media = torch.ones(1, 1, 2, requires_grad=True)
    merge_image_embeddings(embeds, media, torch.tensor([[True, False]])).sum().backward()
    assert embeds.grad.tolist() == [[[0, 0], [1, 1]]]
    assert media.grad.tolist() == [[[1, 1]]]


def test_a_count_that_does_not_agree_names_both_counts():
    with pytest.raises(ValueError) as caught:
        merge_image_embeddings(torch.zeros(1, 2, 2), torch.zeros(2, 2, 2), torch.tensor([[True, False]]))
    assert "1 image placeholders" in str(caught.value) and "4 image features" in str(caught.value)


def test_the_mask_of_a_shared_prefix_with_two_branches():
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]])
    parents = torch.tensor([[-1, -1, 0, 0, 0, -1]])
    assert segment_mask(segments, parents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_a_cached_step_sees_the_valid_columns_and_itself():
    valid = torch.tensor([[True, False, True, True], [True, True, True, False]])
    assert cached_mask(valid, 2)[:, 0].int().tolist() == [[[1, 0, 1, 0], [1, 0, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
