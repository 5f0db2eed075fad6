"""`python -m fedflame` is the `fedflame` command."""

from fedflame.cli import app

if __name__ == "__main__":
    app(prog_name="fedflame")
