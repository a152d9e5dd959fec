"""The `switchkd` command as a person meets it: help, mistakes, missing parts, interruptions and bugs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from switchkd.cli.main import COMMANDS, Command, main

HEAVY = ("torch", "transformers", "onnxruntime", "numpy", "PIL", "gradio", "argcomplete")


def switchkd(*words: str, cwd: Path, table: str = "COMMANDS") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with the given expression as its table of commands."""
    code = f"import sys\nfrom switchkd.cli.main import COMMANDS, Command, main\nsys.exit(main(commands={table}))"
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def command_file(folder: Path, body: str, errors: str = "()") -> str:
    """Write a command module with the given body of `run` and return a table that holds it as `greet`."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / "greet_command.py").write_text(
        f"import sys\nERRORS = {errors}\n"
        "def add_arguments(parser):\n"
        "    parser.add_argument('name')\n"
        "    parser.add_argument('--times', type=int, default=1)\n"
        f"def run(args):\n{lines}\n",
        encoding="utf-8",
    )
    # `python -c` puts the current directory on the path, where the module lies.
    return "[Command('greet', 'greet_command', 'say hello', 'test', 'serve')]"


def test_help_names_every_command_and_imports_no_room(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom switchkd.cli.main import main\nmain(['--help'])\n"
        f"loaded = [name for name in sys.modules if name.startswith('switchkd.') or name.split('.')[0] in {HEAVY!r}]\n"
        "print(sorted(loaded), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "['switchkd.cli', 'switchkd.cli.main']"
    for command in COMMANDS:
        assert f"  {command.name} " in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_the_console_script_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "switchkd"
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("switchkd 0.")


@pytest.mark.parametrize("words", [[], ["help"], ["-h"], ["--help"]])
def test_asking_for_nothing_in_particular_shows_the_front_page(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("usage: switchkd COMMAND")


def test_a_misspelt_command_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprot"]) == 2
    error = capsys.readouterr().err
    assert "no command 'exprot'; did you mean 'export'?" in error
    assert error.count("\n") == 1
    assert main(["zzzzz"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    assert main(["--versoin"]) == 2
    assert "no option '--versoin'; did you mean '--version'?" in capsys.readouterr().err


def test_a_command_runs_and_its_exit_code_is_ours(tmp_path: Path) -> None:
    table = command_file(tmp_path, "print('hello ' * args.times + args.name)\nreturn 0 if args.name == 'Ada' else 1")
    done = switchkd("greet", "Ada", "--times", "2", cwd=tmp_path, table=table)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello hello Ada\n", "")
    assert switchkd("greet", "Bob", cwd=tmp_path, table=table).returncode == 1


def test_a_wrong_argument_is_one_line(tmp_path: Path) -> None:
    table = command_file(tmp_path, "return 0")
    done = switchkd("greet", "Ada", "--times", "often", cwd=tmp_path, table=table)
    assert done.returncode == 2
    assert done.stderr.startswith("switchkd greet: error: argument --times: invalid int value: 'often'")
    assert done.stderr.count("\n") == 1
    assert "say hello" in switchkd("help", "greet", cwd=tmp_path, table=table).stdout.lower()


def test_an_error_for_people_is_one_line(tmp_path: Path) -> None:
    table = command_file(tmp_path, "raise FileNotFoundError('no picture at\\n  cat.png; check the path')", "(OSError,)")
    done = switchkd("greet", "Ada", cwd=tmp_path, table=table)
    assert done.returncode == 2
    assert done.stderr == "switchkd: error: no picture at cat.png; check the path\n"


def test_a_bug_shows_its_traceback(tmp_path: Path) -> None:
    table = command_file(tmp_path, "return {}['missing']", "(ValueError,)")
    done = switchkd("greet", "Ada", cwd=tmp_path, table=table)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'missing'" in done.stderr


def test_a_missing_package_names_the_extra(tmp_path: Path) -> None:
    table = command_file(tmp_path, "import no_such_package.part\nreturn 0")
    done = switchkd("greet", "Ada", cwd=tmp_path, table=table)
    assert done.returncode == 2
    assert "needs the package 'no_such_package'" in done.stderr
    assert "pip install 'switchkd[serve]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["switchkd.serve.no_such_module", "argparse.no_such_part", "pytest.no_such_part"])
def test_a_missing_module_of_something_installed_is_a_bug(tmp_path: Path, module: str) -> None:
    table = command_file(tmp_path, f"import {module}\nreturn 0")
    done = switchkd("greet", "Ada", cwd=tmp_path, table=table)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_an_interruption_ends_with_130(tmp_path: Path) -> None:
    table = command_file(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsignal.pause()")
    done = switchkd("greet", "Ada", cwd=tmp_path, table=table)
    assert done.returncode == 130
    assert done.stderr == "\nswitchkd: interrupted\n"


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    table = command_file(tmp_path, "for i in range(200000): print(i)\nreturn 0")
    code = f"import sys\nfrom switchkd.cli.main import Command, main\nsys.exit(main(commands={table}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "greet", "Ada"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_a_narrow_terminal_gets_a_number_and_loses_nothing(tmp_path: Path) -> None:
    table = command_file(tmp_path, "print('\\u03bb = 1')\nreturn 0")
    code = f"import sys\nfrom switchkd.cli.main import Command, main\nsys.exit(main(commands={table}))"
    done = subprocess.run(
        [sys.executable, "-c", code, "greet", "Ada"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"\\u03bb = 1\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("buffering", ["", "1"])
@pytest.mark.parametrize("words", [["greet", "Ada"], ["greet", "--help"], ["--help"]], ids=" ".join)
def test_a_full_disk_is_one_line(tmp_path: Path, words: list[str], buffering: str) -> None:
    table = command_file(tmp_path, "print('hello')\nreturn 0")
    code = f"import sys\nfrom switchkd.cli.main import Command, main\nsys.exit(main(commands={table}))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": buffering},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(
            "switchkd: error: nothing more can be written (No space left on device): make room"
        )
        assert done.stderr.count("\n") == 1
        # Where not even this can be said the code still tells.
        assert (
            subprocess.run([sys.executable, "-m", "switchkd.cli.main", "no"], stderr=full, check=False).returncode == 2
        )


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_a_closed_stdout_is_told_and_a_closed_stderr_does_not_mix_up_the_two(tmp_path: Path) -> None:
    def run(close: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "switchkd.cli.main", "no-such-command"]
        command = ["sh", "-c", f'exec "$@" {close}', "sh", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run(">&-")
    assert done.returncode == 2
    assert (
        done.stderr == "switchkd: error: standard output is closed; send it to /dev/null where nothing is to be shown\n"
    )
    done = run("2>&-")
    assert (done.returncode, done.stdout) == (2, "")


def test_the_table_is_in_order() -> None:
    assert len({command.name for command in COMMANDS}) == len(COMMANDS)
    for command in COMMANDS:
        assert isinstance(command, Command)
        assert command.module.startswith("switchkd.")
