"""`python -m vlmprune` is the command `vlmprune`; `accelerate launch -m vlmprune sweep ...` needs it."""

from vlmprune.cli import app

if __name__ == "__main__":
    app(prog_name="vlmprune")
