"""The starter: a real model trained from small open parts, and its report."""
