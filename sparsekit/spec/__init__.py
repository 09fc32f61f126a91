"""What a user writes: specs, their slots, and how they are read."""

from sparsekit.spec.slot import Choice, Params, Slot, pick

__all__ = ["Choice", "Params", "Slot", "pick"]
