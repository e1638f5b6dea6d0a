"""What results show in notebooks and terminals: trees and bars, and names that stay text."""

import importlib.util
import json
import pickle
import re
import shutil
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from IPython.core.formatters import DisplayFormatter

import anemoi_ckpt
import needs
from _anemoi_ckpt.pictures import Branch, as_text, bounded, grown, joined
from _anemoi_ckpt.tables import Table
from anemoi_ckpt import CheckpointError, diff, find, load, load_into, main, peek, plan, save, verify
from strategies import weights

ROOT = Path(anemoi_ckpt.__file__).parent
HOSTILE = {
    "script": "<script>document.title = 'ran'</script>",
    "image": "\"'><img src=x onerror=\"document.title = 'ran'\">",
    "style": "</style></details></table><b onclick=x>",
    "entity": "&lt;b&gt; & &#0;",
    "terminal": "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\nforged",
    "reversed": "\u202egpj.\u2066exe\u200b",
    "template": "{{7*7}} ${x} `y` {0.__class__}",
}
TAGS = {
    *("div", "style", "table", "tr", "th", "td", "code", "p", "details", "summary", "span"),
    *("small", "i"),
}


class Parsed(HTMLParser):
    """HTML, of which nothing may be but what we write."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.widths = "", list[str](), list[float]()
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        self.tags.append(tag)
        self._open.append(tag)
        for name, value in attrs:
            assert name in {"class", "style", "open"}
            if tag == "i":
                share = re.fullmatch(r"width:(\d+\.\d)%", value or "")
                assert share
                self.widths.append(float(share[1]))
            elif name == "class":
                assert value in {"anemoi-ckpt", "row", "leaf", "bar"}
            elif name == "style":
                assert value == "text-align:left"

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def model() -> torch.nn.ModuleDict:
    parts = {"encoder": torch.nn.Linear(40, 50), "decoder": torch.nn.Linear(50, 4, bias=False)}
    return torch.nn.ModuleDict(parts)


def checkpoint(value: float, *names: str) -> dict[str, Any]:
    state = {
        "model.encoder.weight": torch.full((50, 40), value),
        "model.encoder.bias": torch.full((50,), 2.0),
        "model.decoder.weight": torch.full((4, 50), 1 + value / 10),
    }
    state["model.tied.weight"] = state["model.encoder.weight"]
    state |= {f"model.{name}": torch.full((3,), value) for name in names}
    return {"state_dict": state, "optimizer_states": [{"m": torch.zeros(900)}], "epoch": 3}


# ── trees ─────────────────────────────────────────────────────────────────────────────────────


def test_modules_by_what_they_take(tmp_path: Path) -> None:
    tree = peek(save(checkpoint(1.0), tmp_path / "a.ckpt")).tree()
    assert (tree.bytes, tree.values) == (4 * 2250 + 3600, 2250 + 900)  # a tied tensor once
    encoder = tree["state_dict.model.encoder"]
    assert (encoder.name, encoder.bytes, encoder.values) == ("encoder", 8200, 2050)
    assert list(encoder.children) == ["weight", "bias"]
    assert encoder["bias"].tensors[0].shape == (50,)
    tied = tree["state_dict.model.tied.weight"]
    assert (tied.bytes, tied.tensors[0].tied) == (0, "state_dict.model.encoder.weight")
    assert tree.as_dict()["children"]["state_dict"]["bytes"] == 9000
    assert repr(pickle.loads(pickle.dumps(tree))) == repr(tree)
    lines = repr(tree).splitlines()
    assert lines[0].split() == ["all", "██████████", "12.6", "kB,", "3,150", "values"]
    assert lines[2].split()[:2] == ["encoder", "███████"]
    assert lines[4].split()[:2] == ["bias", "▏"]
    with pytest.raises(KeyError, match="no 'model' in the tree: but state_dict, optimizer_states"):
        tree["model"]


def test_a_tree_of_names_that_are_tensors_and_modules(tmp_path: Path) -> None:
    state = {"a": torch.zeros(4), "a.b": torch.zeros(2), "": torch.zeros(1), "c..d": torch.ones(1)}
    tree = peek(save(state, tmp_path / "a.ckpt")).tree()
    assert tree.bytes == 32
    assert tree["a"].bytes == 24
    assert tree["c..d"].bytes == 4
    assert len(tree.tensors) == 1
    Parsed(tree._repr_html_())
    found = diff(tmp_path / "a.ckpt", {"a": torch.ones(4), "a.b": torch.zeros(2)})
    Parsed(found._repr_html_())


def test_what_is_drawn_is_bounded(tmp_path: Path) -> None:
    names = [*(f"layers.{i}.w" for i in range(700)), *(f"wide.{i}" for i in range(600))]
    found = peek(save({"a.w": torch.ones(1)}, tmp_path / "a.ckpt"))
    found = evolve(found, tensors=[evolve(found.tensors[0], name=name) for name in names])
    parsed = Parsed(found._repr_html_())
    assert parsed.tags.count("small") == 1 + 2 + 2 * 501 + 500
    assert "… and 100 more" in parsed.text
    assert "… and 200 more" in parsed.text
    assert len(repr(found.tree()).splitlines()) == parsed.tags.count("small")
    assert found.tree().values == 1300


def test_what_is_beyond_is_counted_where_it_was() -> None:
    tree = Branch("a", children=[Branch("b", children=[Branch("c")] * 4), Branch("d")])
    rows = as_text([bounded(tree, 4)])
    assert [row.strip() for row in rows] == ["a", "b", "c", "c", "… and 2 more", "d"]
    assert as_text([bounded(tree)]) == as_text([tree])
    chain = joined(Branch("", children=[Branch("x", children=[Branch("y", children=[tree])])]))
    assert (chain.name, [each.name for each in chain.children]) == ("x.y.a", ["b", "d"])


def test_a_name_with_any_number_of_dots_is_no_tower() -> None:
    def depth(_name: str, own: Any, below: Any) -> int:
        return 1 + max(below, default=0) if below or own else 0

    assert grown([("a." * 100_000, None)], depth) == 34


# ── notebooks ─────────────────────────────────────────────────────────────────────────────────


def test_peek_shows_modules_with_bars(tmp_path: Path) -> None:
    parsed = Parsed(peek(save(checkpoint(1.0), tmp_path / "a.ckpt"))._repr_html_())
    assert parsed.tags.count("details") == 6  # all, state dict and model, encoder, decoder, tied, m
    assert parsed.widths[0] == 100.0
    assert parsed.widths[2] == 65.1  # the encoder: 8,200 of 12,600 bytes
    assert "tied to state_dict.model.encoder.weight" in parsed.text


def test_plan_shows_moved_of_stored(tmp_path: Path) -> None:
    state = {"a": torch.zeros(500_000), "b": torch.zeros(250_000)}
    found = plan(save(state, tmp_path / "a.ckpt"), lambda loaded: {"b": loaded["b"]})
    parsed = Parsed(found._repr_html_())
    moved, to_move, *_ = parsed.widths
    assert moved == round(100 * found.bytes_moved / found.bytes_stored, 1)
    assert to_move == pytest.approx(33.3, abs=0.5)
    assert "to move, of 3 MB stored" in parsed.text
    assert "███░░░░░░░" in repr(found) or "████░░░░░░" in repr(found)


def test_diff_shows_how_far_layers_are_apart(tmp_path: Path) -> None:
    a, b = (save(checkpoint(value), tmp_path / f"{value}.ckpt") for value in (1.0, 2.0))
    parsed = Parsed(diff(a, b, weights, values=True)._repr_html_())
    assert "bar: relative change, 1 where it is full" in parsed.text
    # model, encoder, its weight and bias, decoder, tied and their weights
    assert parsed.widths == [100, 100, 100, 0, 9.1, 9.1, 100, 100]
    told = repr(diff(a, b, weights, values=True))
    assert re.search(r"encoder  ██████████  1 of 2 differ, relative 1\n", told)
    assert re.search(r"decoder  █           1 of 1 differ, relative 0.0909\n", told)
    without = Parsed(diff(a, b, weights)._repr_html_())
    assert "values=True tells how far" in without.text
    assert without.widths == [75, 50, 100, 0, 100, 100, 100, 100]
    same = diff(a, a)
    assert "5 equal" in Parsed(same._repr_html_()).text
    assert "\nlayers" not in repr(same)


def test_diff_of_what_was_zero_and_of_other_shapes() -> None:
    a = {"w.a": torch.zeros(2), "w.b": torch.ones(2), "x.c": torch.ones(3), "x.gone": torch.ones(1)}
    b = {"w.a": torch.ones(2), "w.b": torch.ones(2) * 2, "x.c": torch.ones(4), "y": torch.ones(1)}
    parsed = Parsed(diff(a, b, values=True)._repr_html_())
    assert "relative inf" in parsed.text
    assert "(3,) float32 → (4,) float32" in parsed.text
    assert "added" in parsed.text
    assert "gone" in parsed.text
    only = Parsed(diff({"a": torch.zeros(1)}, {"a": torch.ones(1)}, values=True)._repr_html_())
    assert only.widths == [100, 100]
    nothing = Parsed(diff({"a": torch.zeros(1)}, {"a": torch.zeros(1)})._repr_html_())
    assert "1 equal" in nothing.text


def test_a_notebook_asks_for_both(tmp_path: Path) -> None:
    name = HOSTILE["script"].replace(".", "")
    found = peek(save(checkpoint(1.0, name), tmp_path / "a.ckpt"))
    data, _ = DisplayFormatter().format(found)
    assert "<details open>" in data["text/html"]
    assert name in Parsed(data["text/html"]).text
    assert data["text/plain"] == repr(found)


# ── names ─────────────────────────────────────────────────────────────────────────────────────


def results(folder: Path) -> dict[str, Table]:
    """Give what shows names, all of which are hostile."""
    names = [name.replace(".", "") for name in HOSTILE.values()]
    file = folder / f"{HOSTILE['image'].replace('/', '')}\x1b[2J.ckpt"
    for value in (1.0, 2.0):
        told = {"run_id": names[0], "version": names[4]}
        save(checkpoint(value, *names), f"{file}{value}.ckpt", metadata=told)
    a, b = f"{file}1.0.ckpt", f"{file}2.0.ckpt"
    rest = {"state_dict": {**model().state_dict(), names[4]: torch.ones(1)}, names[1]: names[4]}
    nan = save({names[4]: torch.tensor([float("nan")])}, folder / "nan.ckpt")
    return {
        "peek": peek(a),
        "tree": peek(a).tree(),
        "plan": plan(a, weights),
        "diff": diff(a, b, values=True),
        "diff without values": diff(a, b),
        "diff of other names": diff(a, {f"b.{name}": torch.ones(1) for name in names}),
        "verify": verify(nan, values=True),
        "find": find(folder),
        "report": load_into(model(), rest),
    }


def test_hostile_names_stay_text_everywhere(tmp_path: Path) -> None:
    for name, result in results(tmp_path).items():
        parsed = Parsed(result._repr_html_())
        for text in (parsed.text, repr(result)):
            assert "".join(text.splitlines()).isprintable(), name
            assert "\\x1b[2J" in text, name
            assert "\x9b" not in text
            assert "\nforged" not in text


def test_hostile_names_in_errors_and_in_a_shell(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    name = HOSTILE["terminal"].replace("\n", "")
    save({name: torch.ones(2)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"\\x1b\[2J") as caught:
        load_into(model(), tmp_path / "a.ckpt", strict=True)
    again = pickle.loads(pickle.dumps(caught.value))
    for err in (caught.value, again):
        assert str(err).replace("\n", "").isprintable()
        assert err.problem.replace("\n", "").isprintable()
    path = tmp_path / f"gone{name}.ckpt"
    assert main(["peek", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert main(["peek", str(tmp_path / "a.ckpt")]) == 0
    assert main(["ls", str(tmp_path)]) == 0
    odd = tmp_path / "odd\x1b[2J.ckpt"
    odd.write_bytes((tmp_path / "a.ckpt").read_bytes())
    assert main(["latest", f"{tmp_path}/odd*"]) == 0
    assert capsys.readouterr().out.endswith(f"{odd}\n")  # a program gets the name as it is
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(["latest", f"{tmp_path}/odd*"]) == 0
    monkeypatch.setenv("ANEMOI_CKPT_CACHE", str(tmp_path / "cache"))
    load(odd, cached=True)
    assert main(["cache"]) == 0
    shown = capsys.readouterr()
    assert "".join((shown.out + shown.err).splitlines()).isprintable()
    inert = torch.nn.Linear(1, 1)
    inert.__dict__[name] = 1
    torch.save(inert, tmp_path / "module.pt")
    assert repr(load(tmp_path / "module.pt")).isprintable()


# ── chromium ──────────────────────────────────────────────────────────────────────────────────


MEASURED = """<script>
const rows = [...document.querySelectorAll('.row')];
const width = each => each.getBoundingClientRect().width;
document.body.dataset.told = JSON.stringify({
  ran: document.title,
  images: document.images.length,
  shown: rows.filter(each => each.checkVisibility()).length,
  all: rows.length,
  shares: [...document.querySelectorAll('.row>.bar')].filter(each => each.checkVisibility())
    .map(each => Math.round(100 * width(each.firstChild) / width(each))),
  text: rows.map(each => each.innerText).join(' '),
  colour: getComputedStyle(rows[0]).color,
});
</script>"""


def test_a_browser_runs_nothing_and_draws_bars(tmp_path: Path) -> None:
    """Chromium is Debian's, of which headless mode is a part."""
    if shutil.which("chromium") is None:
        err = FileNotFoundError("chromium")
        needs.give_up("chromium", err, "chromium is missing: apt-get install chromium")
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs" / "screenshots.py")
    assert spec
    assert spec.loader
    screenshots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(screenshots)
    html = "".join(each._repr_html_() for each in results(tmp_path).values())
    shown = peek(save(checkpoint(1.0), tmp_path / "plain.ckpt"))._repr_html_()
    page = screenshots.page(shown + html, dark=True)
    dom = screenshots.drawn(page + MEASURED, "--dump-dom").stdout
    told = json.loads(unescape(re.findall('data-told="(.*?)"', dom)[0]))
    assert told["ran"] == ""
    assert told["images"] == 0
    assert 0 < told["shown"] < told["all"]  # what is folded takes no room
    assert told["shares"][:3] == [100, 71, 29]  # all, the state dict and the optimizer
    assert "documenttitle = 'ran'</script>" in told["text"]
    assert told["colour"] == "rgb(224, 224, 224)"  # the page's, which is dark
