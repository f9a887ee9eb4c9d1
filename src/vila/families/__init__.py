"""Facts on each LLM family as plain data."""

from vila.families.card import FamilyCard, find_family

__all__ = ["FamilyCard", "find_family"]
