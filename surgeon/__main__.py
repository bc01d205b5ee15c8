"""``python -m surgeon`` is the ``surgeon`` command."""

from surgeon.cli import main

if __name__ == "__main__":
    main()
