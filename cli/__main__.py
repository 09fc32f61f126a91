"""``python -m sparsekit.cli``, as torchrun starts it."""

from . import main

main()
