"""`python -m rlhf`: what the launcher starts on every rank."""

from rlhf.cli.app import main

if __name__ == "__main__":
    main()
