"""How fast `load` is, side by side with what a user would run instead.

    python benchmarks/load.py [--size BYTES] [--rounds N] [--out FILE.json]

Makes a checkpoint in Lightning's layout (AdamW, a third of it weights), serves it on this machine,
and loads it with each competitor in a fresh process. Seconds are the best of the rounds, without
imports; memory is the peak of the process above that of `import torch`, as a multiple of the file;
bytes are what the server sent (of both, the most of the rounds). All competitors must give the
same, in every round.
"""

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LAYER = {"qkv": (3072, 1024), "out": (1024, 1024), "up": (4096, 1024), "down": (1024, 4096)}
LAYER |= {"norm.weight": (1024,), "norm.bias": (1024,)}
URI = "s3://bench/last.ckpt"
CLOUD_SDKS = ("boto3", "botocore", "google.cloud", "google.auth", "azure")
OURS = "anemoi-ckpt"

# ── the competitors ───────────────────────────────────────────────────────────────────────────


def read(file: Any) -> Any:
    """Give what a user of torch alone would: weights_only, on the CPU."""
    return torch.load(file, "cpu", weights_only=True)


def smart_open(path: str) -> Any:
    import smart_open

    with smart_open.open(path, "rb") as file:
        return read(file)


def fsspec(path: str) -> Any:
    import fsspec

    with fsspec.open(f"{os.environ['AWS_ENDPOINT_URL']}/{path.removeprefix('s3://')}") as file:
        return read(file)


def boto3_body(path: str) -> Any:
    import boto3

    del path
    body = boto3.client("s3").get_object(Bucket="bench", Key="last.ckpt")["Body"]
    return read(io.BytesIO(body.read()))


def boto3_file(path: str) -> Any:
    import boto3

    del path
    with tempfile.NamedTemporaryFile() as file:
        boto3.client("s3").download_file("bench", "last.ckpt", file.name)
        return read(file.name)


def obstore_file(path: str) -> Any:
    import obstore
    import obstore.store

    del path
    store = obstore.store.S3Store(
        "bench",
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "10 minutes"},
    )
    with tempfile.NamedTemporaryFile() as file:
        for chunk in obstore.get(store, "last.ckpt").stream(min_chunk_size=8 * 1024**2):
            file.write(chunk)
        file.flush()
        return read(file.name)


def s3torchconnector(path: str) -> Any:
    import s3torchconnector

    config = s3torchconnector.S3ClientConfig(force_path_style=True)
    checkpoint = s3torchconnector.S3Checkpoint(
        "us-east-1", endpoint=os.environ["AWS_ENDPOINT_URL"], s3client_config=config
    )
    with checkpoint.reader(path) as reader:
        return read(reader)


def ours(path: str) -> Any:
    from anemoi_ckpt import load

    return load(path)


def our_weights(path: str) -> Any:
    from anemoi_ckpt import load
    from strategies import weights

    return load(path, weights)


REMOTE: dict[str, tuple[str, Callable[[str], Any]]] = {
    OURS: ("anemoi_ckpt", ours),
    "torch.load(smart_open.open)": ("smart_open", smart_open),
    "torch.load(fsspec.open)": ("fsspec.implementations.http", fsspec),
    "torch.load(boto3 body)": ("boto3", boto3_body),
    "boto3 download_file + torch.load": ("boto3", boto3_file),
    "obstore to a file + torch.load": ("obstore", obstore_file),
    "s3torchconnector + torch.load": ("s3torchconnector", s3torchconnector),
}
LOCAL = {OURS: ("anemoi_ckpt", ours), "torch.load": ("torch", read)}
COMPETITORS = {**LOCAL, **REMOTE}


def installed(module: str) -> bool:
    """Tell whether a package, and what it needs for this, can be imported."""
    try:
        return importlib.util.find_spec(module) is not None and (
            not module.startswith("fsspec") or importlib.util.find_spec("aiohttp") is not None
        )
    except ModuleNotFoundError:  # the package that it is in
        return False


# ── one run, in a process of its own ──────────────────────────────────────────────────────────


def peak_bytes() -> int:
    """Give the peak of this process's memory; getrusage would count its parent's at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def child(name: str, what: str, path: str) -> None:
    """Load once, and print what it took."""
    module, function = COMPETITORS[name]
    importlib.import_module(module)
    if name == OURS:
        import boto3  # noqa: F401 - the others have theirs imported, too
        import smart_open.s3

        assert smart_open.s3
        function = our_weights if what == "weights" else ours
    begin = time.perf_counter()
    result = function(path)
    if what == "weights" and name != OURS:
        result = result["state_dict"]
    seconds = time.perf_counter() - begin
    peak = peak_bytes()
    print(json.dumps({"seconds": seconds, "peak": peak, "sum": checksum(result)}))


def checksum(result: Any) -> int:
    """Give a CRC-32 over all names, dtypes, shapes and bytes, and whatever else there is."""
    crc = 0
    for path, leaf in torch.utils._pytree.tree_flatten_with_path(result)[0]:
        if isinstance(leaf, torch.Tensor):
            crc = zlib.crc32(f"{path} {leaf.dtype} {tuple(leaf.shape)}".encode(), crc)
            crc = zlib.crc32(leaf.contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
        else:
            crc = zlib.crc32(f"{path} {leaf!r}".encode(), crc)
    return crc


def run(name: str, what: str, path: str) -> dict[str, Any]:
    """Run a competitor in a fresh process."""
    command = [sys.executable, __file__, "--child", name, what, path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(code: str, count: int = 7) -> float:
    """Give the median of what a line of Python prints, over fresh processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        for _ in range(count)
    ]
    return statistics.median(float(done.stdout) for done in runs)


# ── the scenarios ─────────────────────────────────────────────────────────────────────────────


def make_checkpoint(path: Path, size: float) -> None:
    """Write a checkpoint of about `size` bytes, the same every time."""
    draw = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    while sum(tensor.nbytes for tensor in state.values()) < size / 3:
        number = len(state) // len(LAYER)
        for name, shape in LAYER.items():
            state[f"model.layers.{number}.{name}"] = torch.randn(shape, generator=draw)
    moments = {
        number: {"step": torch.tensor(10.0), "exp_avg": tensor * 0.1, "exp_avg_sq": tensor**2}
        for number, tensor in enumerate(state.values())
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": list(range(len(state)))}]
    checkpoint = {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state,
        "optimizer_states": [{"state": moments, "param_groups": groups}],
        "lr_schedulers": [],
    }
    torch.save(checkpoint, path)


def made_checkpoint(size: float) -> Path:
    """Give the path of such a checkpoint, `FOLDER/bench/last.ckpt`; it is kept for the next run."""
    folder = Path(tempfile.gettempdir()) / f"anemoi-ckpt-benchmark-{size:.0f}"
    path = folder / "bench" / "last.ckpt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make_checkpoint(path.with_suffix(".part"), size)
        path.with_suffix(".part").rename(path)  # whole, or not there
    return path


class Bench:
    """The server, the file, and the lines of the report."""

    def __init__(self, url: str, path: Path, rounds: int) -> None:
        """Take the server's URL and the file that it serves."""
        self.url, self.path, self.rounds = url, path, rounds
        self.size = path.stat().st_size
        self.base = measured("import benchmarks.load; print(benchmarks.load.peak_bytes())", 3)
        self.results: list[dict[str, Any]] = []

    def say(self, line: str = "") -> None:
        """Show a line of the report."""
        print(line, flush=True)

    def reset(self, **settings: float) -> None:
        """Set the server's rate and delay, and empty its log."""
        query = urllib.parse.urlencode(settings)
        urllib.request.urlopen(f"{self.url}/__reset__?{query}", data=b"").close()

    def log(self) -> list[dict[str, Any]]:
        """Give the server's log, in the order of the requests."""
        with urllib.request.urlopen(f"{self.url}/__stats__") as reply:
            return sorted(json.load(reply), key=lambda entry: entry["begin"])

    def compare(self, title: str, what: str, *, rate: float, rounds: int, local: bool) -> None:
        """Run all competitors in turn, `rounds` times, and report the best of each."""
        self.say(f"\n**{title}**\n")
        self.say("| | seconds | times ours | bytes moved | peak memory |")
        self.say("| --- | ---: | ---: | ---: | ---: |")
        competitors = LOCAL if local else REMOTE
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in competitors}
        for _ in range(rounds):
            for name, (module, _) in competitors.items():
                if not installed(module):
                    continue
                self.reset(rate=rate)
                result = run(name, what, str(self.path) if local else URI)
                result["moved"] = sum(entry.get("bytes", 0) for entry in self.log())
                found[name].append(result)
                self.results.append({"scenario": title, "competitor": name, **result})
                if result["sum"] != found[OURS][0]["sum"]:
                    raise SystemExit(f"{name} gives something else than {OURS}")
        least = min(result["seconds"] for result in found[OURS])
        for name, results in found.items():
            if not results:
                self.say(f"| {name} | not installed | | | |")
                continue
            seconds = min(result["seconds"] for result in results)
            most = max(result["moved"] for result in results)
            moved = "" if local else f"{most / self.size:.1%}"
            peak = (max(result["peak"] for result in results) - self.base) / self.size
            self.say(f"| {name} | {seconds:.2f} | {seconds / least:.1f} | {moved} | {peak:.2f} |")

    def round_trips(self, delay: float) -> None:
        """Count the requests, one after another, before the tensors' bytes flow."""
        self.reset(delay=delay)
        seconds = run(OURS, "weights", URI)["seconds"]
        begun, rounds = float("-inf"), 0
        log = self.log()
        for entry in log:
            if entry.get("bytes", 0) > 1024**2:
                break
            if entry["begin"] >= begun + delay:
                begun, rounds = entry["begin"], rounds + 1
        self.results.append({"scenario": f"{delay} s a request", "seconds": seconds, "log": log})
        self.say(
            f"\nWith {delay * 1000:.0f} ms a request: {rounds} after one another before the "
            f"tensors' bytes flow; weights in {seconds:.2f} s."
        )

    def imports(self) -> None:
        """Time `import anemoi_ckpt` on top of `import torch`."""
        seconds = measured(
            "import time, torch; t = time.perf_counter(); import anemoi_ckpt; "
            "print(time.perf_counter() - t)"
        )
        count = measured(
            f"import sys, anemoi_ckpt; print(sum(name in sys.modules for name in {CLOUD_SDKS}))", 1
        )
        self.results.append({"scenario": "import", "seconds": seconds, "cloud SDKs": count})
        self.say(
            f"\n`import anemoi_ckpt` adds {seconds:.2f} s to `import torch`, and imports "
            f"{count:.0f} of {', '.join(CLOUD_SDKS)}."
        )


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Run the server in a process of its own, and let S3 be there."""
    command = [sys.executable, str(ROOT / "benchmarks" / "server.py"), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            url = process.stdout.readline().strip()
            os.environ |= {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "bench",
                "AWS_SECRET_ACCESS_KEY": "bench",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            yield url
        finally:
            process.kill()


def main() -> None:
    """Run all scenarios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=1.6e9, help="of the checkpoint, in bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures of every round there")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    path = made_checkpoint(options.size)
    with serving(path.parent.parent) as url:
        bench = Bench(url, path, options.rounds)
        bench.say(f"A checkpoint of {bench.size / 1e9:.2f} GB, {os.cpu_count()} cores.")
        compare, more = bench.compare, options.rounds
        title = "Weights only, 80 MB/s a connection (as an object store)"
        compare(title, "weights", rate=80e6, rounds=1, local=False)
        compare("Weights only, unlimited", "weights", rate=0, rounds=more, local=False)
        compare("Everything, unlimited", "everything", rate=0, rounds=more, local=False)
        compare("Weights only, local, warm", "weights", rate=0, rounds=more, local=True)
        compare("Everything, local, warm", "everything", rate=0, rounds=more, local=True)
        bench.round_trips(0.05)
        bench.imports()
        if options.out:
            options.out.write_text(json.dumps(bench.results, indent=1))


if __name__ == "__main__":
    main()
