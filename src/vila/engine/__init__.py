"""The only way anything generates or scores text: `generate`, `stream`, `generate_batch`, `complete`, `score`."""
