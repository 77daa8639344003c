"""`python -m nhabench`."""

from nhabench.cli import app

if __name__ == "__main__":
    app(prog_name="python -m nhabench")
