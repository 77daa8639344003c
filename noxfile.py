"""The project's commands: `nox` runs tests, lint and types; `nox -s bench`, `suites` and `regress` measure."""

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.default_venv_backend = "virtualenv"

CONSTRAINTS = ("--constraint", "constraints.txt")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests against the installed project: nox -s tests -- [pytest's arguments]."""
    session.install(*CONSTRAINTS, ".[dev]")
    session.run("pytest", "--numprocesses=auto", "--dist=worksteal", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Race NHA against full and linear attention: nox -s bench -- [arguments of `nhabench bench`]."""
    # Editable, so that the code that runs is the checkout whose commit the results name.
    session.install(*CONSTRAINTS, "--editable", ".")
    # Ctrl-C reaches the benchmark too, which then writes down what it has measured: leave it the time.
    session.run("python", "-m", "nhabench", "bench", *session.posargs, interrupt_timeout=60, terminate_timeout=10)


@nox.session
def suites(session: nox.Session) -> None:
    """Run the suites under pytest-benchmark: nox -s suites -- [files of suites/] [pytest's arguments]."""
    session.install(*CONSTRAINTS, "--editable", ".[dev]")
    chosen = any(argument == "suites" or argument.startswith("suites/") for argument in session.posargs)
    session.run(
        "pytest", *([] if chosen else ["suites"]), "--benchmark-enable", "--benchmark-columns=min,median,iqr,rounds",
        *session.posargs, interrupt_timeout=60, terminate_timeout=10,
    )  # fmt: skip


@nox.session
def regress(session: nox.Session) -> None:
    """Is this checkout slower than a commit, or wrong? nox -s regress -- [BASE] [options of `nhabench regress`]."""
    session.install(*CONSTRAINTS, "--editable", ".")
    session.run("python", "-m", "nhabench", "regress", *session.posargs, interrupt_timeout=60, terminate_timeout=10)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the code's style: ruff check, ruff format."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types: mypy, strict."""
    session.install(*CONSTRAINTS, ".[dev]")
    session.run("mypy", *session.posargs)
