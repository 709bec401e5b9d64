"""Model families as tables."""

from rosaq.models.family import Family, Site, Sizes
from rosaq.models.tables import FAMILIES, family_of

__all__ = ["FAMILIES", "Family", "Site", "Sizes", "family_of"]
