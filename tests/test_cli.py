"""The command line: what it prints, writes and refuses."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

import anemoi_ckpt
import servers
from anemoi_ckpt import load, main, metadata, save
from checkpoints import as_bytes
from conftest import Place

COMMANDS = ["ls", "latest", "peek", "plan", "diff", "verify", "metadata", "copy", "cache"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("anemoi_ckpt").level
    yield
    logging.getLogger("anemoi_ckpt").setLevel(level)


def checkpoint(value: float = 1.0) -> dict[str, Any]:
    state = {"model.encoder.weight": torch.full((500,), value), "model.head.bias": torch.ones(3)}
    return {"state_dict": state, "optimizer_states": [{"m": torch.zeros(900)}], "epoch": 3}


@pytest.fixture
def files() -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save(checkpoint(value), f"{name}.ckpt", metadata={"run_id": "x", "version": "1"})


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_two_examples(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    examples = shown.partition("examples:")[2].strip().splitlines()
    assert len(examples) == 2
    assert all(line.strip().startswith(f"anemoi-ckpt {command}") for line in examples)
    assert all(option in shown for option in ("--json", "--retries", "--timeout", "-v", "-q"))


def test_all_commands_are_listed(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert re.findall(r"^    (\w+)  ", shown, re.MULTILINE) == COMMANDS
    with pytest.raises(SystemExit):
        main(["--version"])
    assert anemoi_ckpt.__version__ in capsys.readouterr().out


@pytest.mark.usefixtures("files")
def test_which_there_are(capsys: Any) -> None:
    os.utime("a.ckpt", (2_000_000_000, 2_000_000_000))
    assert "a.ckpt" in answer(capsys, "ls", ".")
    listed = json.loads(answer(capsys, "ls", "*.ckpt", "--json"))
    assert [each["uri"] for each in listed] == ["a.ckpt", "b.ckpt"]
    assert listed[0]["size"] == Path("a.ckpt").stat().st_size
    assert json.loads(answer(capsys, "ls", "none*", "--json")) == []
    assert answer(capsys, "latest", ".") == "./a.ckpt\n"
    assert json.loads(answer(capsys, "latest", "b*", "--json")) == "b.ckpt"


@pytest.mark.usefixtures("files")
def test_what_is_in_it(capsys: Any) -> None:
    assert "epoch 3" in answer(capsys, "peek", "a.ckpt")
    told = json.loads(answer(capsys, "peek", "a.ckpt", "--json"))
    assert told["epoch"] == 3
    assert told["tensors"][0]["name"] == "model.encoder.weight"
    assert re.search(r"    weight +████ +\(500,\)", answer(capsys, "peek", "a.ckpt", "--tree"))
    told = json.loads(answer(capsys, "peek", "a.ckpt", "--tree", "--json"))
    assert told["children"]["state_dict"]["bytes"] == 2012
    assert json.loads(answer(capsys, "metadata", "a.ckpt"))["run_id"] == "x"
    told = json.loads(answer(capsys, "plan", "a.ckpt", "--include", "model.head", "--json"))
    assert {each["name"] for each in told["tensors"]} == {"model.head.bias", "0.m"}
    shown = answer(capsys, "plan", "a.ckpt", "--weights", "--exclude", "model.head")
    assert "tensors 1" in shown


@pytest.mark.usefixtures("files")
def test_what_differs(capsys: Any) -> None:
    shown = answer(capsys, "diff", "a.ckpt", "b.ckpt", code=1)
    assert "they differ" in shown
    told = json.loads(answer(capsys, "diff", "a.ckpt", "b.ckpt", "--values", "--json", code=1))
    assert told["norms"]["model.encoder.weight"]["max"] == 1.0
    assert "the same" in answer(capsys, "diff", "a.ckpt", "a.ckpt")
    assert "the same" in answer(
        capsys, "diff", "a.ckpt", "b.ckpt", "--weights", "--include", "*.head"
    )


@pytest.mark.usefixtures("files")
def test_what_is_damaged(capsys: Any) -> None:
    assert answer(capsys, "verify", "a.ckpt").endswith("whole\n")
    data = bytearray(Path("a.ckpt").read_bytes())
    data[data.index(torch.full((9,), 1.0).numpy().tobytes())] ^= 1
    Path("a.ckpt").write_bytes(data)
    assert "do not match their checksum" in answer(capsys, "verify", "a.ckpt", "-q", code=1)
    assert len(json.loads(answer(capsys, "verify", "a.ckpt", "--json", code=1))["damaged"]) == 1
    save({"w": torch.tensor([float("nan")])}, "nan.ckpt")
    assert "whole" in answer(capsys, "verify", "nan.ckpt")
    assert "w: 1 values" in answer(capsys, "verify", "nan.ckpt", "--values", code=1)


@pytest.mark.usefixtures("files")
def test_copying_what_is_wanted(capsys: Any) -> None:
    assert answer(capsys, "copy", "a.ckpt", "light.ckpt", "--drop-optimizer") == "light.ckpt\n"
    assert list(load("light.ckpt")) == ["state_dict", "epoch"]
    assert metadata("light.ckpt")["run_id"] == "x"
    answer(
        capsys,
        *("copy", "a.ckpt", "w.safetensors", "--strip-prefix", "model.", "--add-prefix", "net."),
        *("--rename", "head", "tail", "--rename", "tail", "end", "--cast", "float16", "-q"),
    )
    wanted = load("w.safetensors")
    assert list(wanted) == ["net.encoder.weight", "net.end.bias"]
    assert wanted["net.end.bias"].dtype is torch.float16
    answer(capsys, "copy", "a.ckpt", "both.ckpt", "--weights", "--drop-optimizer")
    assert list(load("both.ckpt")) == list(checkpoint()["state_dict"])
    assert json.loads(answer(capsys, "copy", "a.ckpt", "c.ckpt", "--json")) == "c.ckpt"
    assert Path("c.ckpt").read_bytes() == Path("a.ckpt").read_bytes()


@pytest.mark.usefixtures("files")
def test_copying_into_a_folder(capsys: Any) -> None:
    """One that ends with a slash is made, whatever is wanted of the checkpoint."""
    assert answer(capsys, "copy", "a.ckpt", "whole/deep/") == "whole/deep/a.ckpt\n"
    assert answer(capsys, "copy", "a.ckpt", "light/deep/", "--weights") == "light/deep/a.ckpt\n"
    assert answer(capsys, "copy", "b.ckpt", "light/deep", "--weights") == "light/deep/b.ckpt\n"
    assert list(load("light/deep/a.ckpt")) == list(checkpoint()["state_dict"])
    assert Path("whole/deep/a.ckpt").read_bytes() == Path("a.ckpt").read_bytes()
    Path("all.safetensors").mkdir()  # the name of a folder tells no format
    assert answer(capsys, "copy", "a.ckpt", "all.safetensors") == "all.safetensors/a.ckpt\n"
    assert load("all.safetensors/a.ckpt")["epoch"] == 3
    assert main(["copy", "a.ckpt", "a.ckpt/", "--weights"]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert main(["copy", "a.ckpt", "none/", "--include", "nothing"]) == 1
    assert not Path("none").exists()


def test_each_question_of_each_place(place: Place, capsys: Any) -> None:
    """Asked in a shell, of a local disk, a web server and the stores."""
    data = as_bytes(checkpoint())
    uri = place.put("run/last.ckpt", data)
    wrong = bytearray(data)
    wrong[data.index(torch.full((9,), 1.0).numpy().tobytes())] ^= 1
    damaged = place.put("run/deep/damaged.ckpt", bytes(wrong))
    changed = place.put("run/deep/changed.ckpt", as_bytes(checkpoint(3.0)))

    def told(*arguments: str, code: int = 0) -> Any:
        return json.loads(answer(capsys, *arguments, "--json", "-q", code=code))

    assert told("peek", uri)["parameters"] == 503
    assert told("plan", uri, "--weights")["tensors"][1]["name"] == "model.head.bias"
    assert told("diff", uri, changed, code=1)["changed"] == ["model.encoder.weight"]
    norms = told("diff", uri, changed, "--values", code=1)["norms"]
    assert norms["model.encoder.weight"] == {"max": 2.0, "mean": 2.0, "relative": 2.0}
    assert told("diff", uri, changed, "--weights", "--include", "*.head")["equal"] == [
        "model.head.bias"
    ]
    assert told("verify", uri, "--values")["not_finite"] == {}
    assert len(told("verify", damaged, code=1)["damaged"]) == 1
    if place.kind == "http":  # which tells of no folder
        return
    folder = uri.rpartition("/")[0]
    assert [each["uri"] for each in told("ls", folder)] == [changed, damaged, uri]
    assert [each["uri"] for each in told("ls", f"{folder}/*/d*.ckpt")] == [damaged]
    assert told("latest", folder) == uri
    assert told("latest", f"{folder}/**/ch*") == changed


@pytest.mark.usefixtures("files")
def test_anemois_metadata_stay_with_safetensors(capsys: Any) -> None:
    arrays = {"mask": torch.ones(3).numpy()}
    save(checkpoint(), "a.ckpt", metadata=({"run_id": "y"}, arrays))
    answer(capsys, "copy", "a.ckpt", "w.safetensors")
    assert metadata("w.safetensors") == {"run_id": "y", "supporting_arrays_paths": {}}
    with safetensors.safe_open("w.safetensors", "pt") as file:
        assert json.loads(file.metadata()["anemoi.json"])["run_id"] == "y"
    assert anemoi_ckpt.peek("w.safetensors").metadata["run_id"] == "y"
    assert anemoi_ckpt.peek("w.safetensors").notes == {"format": "pt"}
    answer(capsys, "copy", "w.safetensors", "again.ckpt", "--weights")
    assert metadata("again.ckpt")["run_id"] == "y"


class Standard:
    """A standard stream of bytes."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = io.BytesIO(data)


@pytest.mark.usefixtures("files")
def test_standard_input_and_output(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    data = Path("a.ckpt").read_bytes()
    monkeypatch.setattr(sys, "stdin", Standard(data))
    answer(capsys, "copy", "-", "copied.ckpt")
    assert Path("copied.ckpt").read_bytes() == data
    monkeypatch.setattr(sys, "stdin", Standard(data))
    answer(capsys, "copy", "-", "w.ckpt", "--weights")
    assert list(load("w.ckpt")) == list(checkpoint()["state_dict"])
    here = io.TextIOWrapper(io.BytesIO())
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", here)
        assert main(["copy", "a.ckpt", "-"]) == 0
    assert here.buffer.getvalue() == data  # type: ignore[attr-defined] # a BytesIO
    for options, keys in (
        ((), list(checkpoint())),
        (("--weights",), ["model.encoder.weight", "model.head.bias"]),
    ):
        out = subprocess.run(
            [sys.executable, "-m", "anemoi_ckpt", "copy", "a.ckpt", "-", *options],
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        assert list(load(io.BytesIO(out))) == keys


@pytest.mark.usefixtures("files")
def test_an_output_that_is_closed() -> None:
    """By `head`, say."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "anemoi_ckpt", "ls", "."],
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_output_that_is_closed_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["ls", str(tmp_path)]) == 141
        closed.write("what follows goes nowhere")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("copy", "a.ckpt", "none.ckpt", "--weights", "--exclude", "*"), "no tensor is left"),
        (("copy", "a.ckpt", "none.ckpt", "--include", "x*"), "'x*' chooses nothing"),
        (("copy", "a.ckpt", "none.ckpt", "--rename", "(", "x"), "("),
        (("copy", "a.ckpt", "none.ckpt", "--cast", "nn"), "--cast takes a dtype"),
        (("diff", "a.ckpt", "c.ckpt"), "is it one of these"),
        (("verify", "c.ckpt"), "no such file"),
        (("latest", "none*"), "no checkpoint"),
        (("ls", "https://host/run/"), "does not tell what is in it"),
        (("peek", "a.ckpt", "--retries", "-1"), "retries"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], said: str, capsys: Any) -> None:
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.startswith("anemoi-ckpt: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not Path("none.ckpt").exists()


@pytest.mark.usefixtures("files")
def test_copying_to_a_store_and_into_a_folder(s3: servers.Store, capsys: Any) -> None:
    uri = s3.uri("copied-by-cli.ckpt")
    assert answer(capsys, "copy", "a.ckpt", uri) == f"{uri}\n"
    Path("folder").mkdir()
    assert answer(capsys, "copy", uri, "folder") == "folder/copied-by-cli.ckpt\n"
    assert Path("folder/copied-by-cli.ckpt").read_bytes() == Path("a.ckpt").read_bytes()


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(anemoi_ckpt, "find", interrupted)
    assert main(["ls", "."]) == 130


def test_attempts_are_told_as_asked(
    http_server: servers.HTTPServer, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    uri = http_server.put("a.ckpt", as_bytes(checkpoint()))
    told = {}
    for option in ("-q", "-v", "--retries=1"):
        caplog.clear()
        http_server.faults.append(servers.Fault(status=503))
        assert main(["peek", uri, option]) == 0
        told[option] = [each.levelname for each in caplog.records]
    assert told == {"-q": [], "-v": ["WARNING"], "--retries=1": ["WARNING"]}
    http_server.fault = lambda _: servers.Fault(status=503)
    assert main(["peek", uri, "--retries=0", "--timeout=5"]) == 1
    assert "given up" not in capsys.readouterr().out


@pytest.mark.usefixtures("files")
def test_what_is_kept(capsys: Any) -> None:
    kept = anemoi_ckpt.download("a.ckpt")
    (entry,) = json.loads(answer(capsys, "cache", "--json"))
    assert entry["file"] == str(kept)
    assert entry["place"].endswith("a.ckpt")
    assert entry["size"] > 0
    assert "removed" in answer(capsys, "cache", "--clear")
    assert json.loads(answer(capsys, "cache", "--json")) == []


def test_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """As argcomplete asks for it: what follows is written to descriptor 8."""
    pytest.importorskip("argcomplete")
    line = "anemoi-ckpt ve"
    told = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    script = "import os, anemoi_ckpt; os.dup2(1, 8); anemoi_ckpt.main()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **told, "_ARGCOMPLETE_IFS": "\n"},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert done.stdout.decode().strip() == "verify"
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    with pytest.raises(SystemExit):
        main(["--version"])
