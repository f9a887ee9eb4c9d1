"""The starter: a small visual language model trained from open components, with evaluation and a report."""
