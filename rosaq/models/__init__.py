"""Model families as tables."""

from rosaq.models.family import Family, Reads, Site, Sizes, config_key
from rosaq.models.tables import FAMILIES, family_of

__all__ = ["FAMILIES", "Family", "Reads", "Site", "Sizes", "config_key", "family_of"]
