"""Make the pictures of docs/how-to/inspect.md: what `peek`, `plan` and `diff` show in a notebook.

    apt-get install chromium && python docs/screenshots.py

A checkpoint of a small model is made, trained on for some steps with a frozen encoder, and looked
at; headless Chromium draws the HTML that a notebook would get, on the notebook's white ground.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
IMAGES = ROOT / "docs" / "images"
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--force-device-scale-factor=1"),
)


def drawn(html: str, *switches: str) -> subprocess.CompletedProcess[str]:
    """Have headless Chromium draw HTML, which is given to no other program."""
    program = shutil.which("chromium")
    if program is None:
        raise SystemExit("chromium is missing: apt-get install chromium")
    with TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        page.write_text(html, "utf-8")
        profile = f"--user-data-dir={Path(folder, 'profile')}"
        command = [program, *SWITCHES, profile, *switches, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


def page(body: str, *, dark: bool = False) -> str:
    """Put a result into a page that has a notebook's font and colours."""
    colours = "background:#111;color:#e0e0e0" if dark else "background:#fff;color:#212121"
    style = f"margin:12px;font:13px system-ui,sans-serif;{colours}"
    return f"<!doctype html><meta charset='utf-8'><body style='{style}'>{body}"


def training(steps: int) -> dict[str, object]:
    """Train a model with a frozen encoder for some steps, and give what Lightning would write."""
    torch.manual_seed(0)
    blocks = [torch.nn.Linear(256, 256) for _ in range(3)]
    parts = {
        "encoder": torch.nn.Linear(64, 256),
        "processor": torch.nn.Sequential(*blocks),
        "decoder": torch.nn.Linear(256, 64),
    }
    model = torch.nn.ModuleDict(parts)
    parts["encoder"].requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps + 1):
        ahead = parts["decoder"](parts["processor"](parts["encoder"](torch.randn(8, 64))))
        optimizer.zero_grad()
        ahead.square().mean().backward()
        optimizer.step()
    state_dict = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    return {
        "epoch": steps,
        "global_step": 100 * steps,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": state_dict,
        "optimizer_states": [optimizer.state_dict()],
    }


def main() -> None:
    """Make the three pictures."""
    from anemoi_ckpt import diff, peek, plan, save
    from strategies import weights

    IMAGES.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        before, after = (save(training(n), f"{folder}/epoch={n}.ckpt") for n in (1, 4))
        views = {
            "peek": (peek(before), 350),
            "plan": (plan(before, weights), 320),
            "diff": (diff(before, after, weights, values=True), 470),
        }
        for name, (result, height) in views.items():
            html = result._repr_html_().replace(folder, "s3://bucket/run")
            html = html.replace("<details>", "<details open>", 3)
            picture = IMAGES / f"{name}.png"
            drawn(page(html), f"--screenshot={picture}", f"--window-size=860,{height}")
            print(f"{picture.relative_to(ROOT)}: {picture.stat().st_size} bytes")


if __name__ == "__main__":
    main()
