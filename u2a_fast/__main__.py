"""`python -m u2a_fast`, which launchers of several processes can start: `torchrun -m u2a_fast train`."""

from .cli import main

if __name__ == "__main__":
    main()
