"""The conversations of a packed sequence: reference for tests that packing changes nothing."""

from __future__ import annotations

import numpy as np


def split_conversations(sequence):
    """Return ids and indices in the sequence of every conversation, each branch with its prefix."""
    out = []
    start = 0
    for sample in sequence:
        indices, segment_ids = np.arange(start, start + len(sample)), sample.segment_ids
        # A segment that others attend to is their prefix, not a conversation of its own.
        prefixes = {segment.parent for segment in sample.segments}
        for number, segment in enumerate(sample.segments):
            if number not in prefixes:
                own = (segment_ids == number) | (segment_ids == segment.parent)
                out.append((sample.ids[own], indices[own]))
        start += len(sample)
    return out
