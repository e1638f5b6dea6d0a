"""Train, serve the checkpoint over HTTP, load its weights, count bytes. Needs no extra."""

import http.server
import re
import tempfile
import threading
from pathlib import Path

import torch

from anemoi_ckpt import load
from strategies import compose, weights


def train(path: Path) -> torch.nn.Module:
    """Train a small model with AdamW, and save all that going on would need."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(5)))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        batch = torch.randn(8, 1024)
        loss = (model(batch) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    checkpoint = {
        "epoch": 0,
        "global_step": 3,
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
    }
    torch.save(checkpoint, path)
    return model


class Server(http.server.ThreadingHTTPServer):
    """Serves one file, in ranges (RFC 9110, section 14), and counts the bytes."""

    def __init__(self, path: Path) -> None:
        """Listen on any free port of this machine."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = path.read_bytes()
        self.sent = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        """Send the range that was asked for: `bytes=first-last`, or `bytes=-last so many`."""
        data, size = self.server.data, len(self.server.data)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "bytes=0-")
        first, last = asked.groups() if asked else ("0", "")
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.server.sent += end - start  # before who asked can have it and look
        self.wfile.write(data[start:end])

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


def main() -> None:
    """Do it, and say what happened."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        model = train(path)
        with Server(path) as server:
            url = f"http://127.0.0.1:{server.server_port}/last.ckpt"
            state_dict = compose(weights, load)(url)
            server.shutdown()
        assert all(torch.equal(state_dict[k], v) for k, v in model.state_dict().items())
        print(f"loaded {len(state_dict)} tensors from {url}: the model's weights, bit for bit")
        moved, stored = server.sent / 1e6, len(server.data) / 1e6
        print(f"moved {moved:.1f} MB of {stored:.1f} MB stored ({moved / stored:.0%})")


if __name__ == "__main__":
    main()
