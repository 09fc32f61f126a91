"""``python -m sparsekit.cli``, as torchrun starts it."""

from sparsekit.cli import main

main()
