"""`python -m fedpriv` is the same as `fedpriv`."""

from fedpriv.cli import main

main()
