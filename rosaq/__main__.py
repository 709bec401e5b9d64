"""`python -m rosaq` is the `rosaq` command; `torchrun -m rosaq` is it on several processes."""

from rosaq.cli import main

main()
