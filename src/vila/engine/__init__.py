"""The only way anything generates or scores text: `generate`, `stream`, `score`."""
