#!/usr/bin/env python3
"""Builds the template of python.toml, forks it sixteen times and runs program.py in every fork.

Starts a forkd of its own and talks to its Unix socket as any client would. Fails unless every fork answered, with a random
number and a host name of its own and the right result. Leaves nothing running and nothing behind but the template in target/demo.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
PROGRAMS = CHECKOUT / "target/x86_64-unknown-linux-gnu/release"
STATE = CHECKOUT / "target/demo"
TEMPLATE = "python"
FORKS = 16
STAGES = {
    "root": "making the root image",
    "initramfs": "writing the initramfs",
    "boot": "booting the guest and warming it up",
    "freeze": "freezing it",
    "save": "saving the snapshot",
    "load": "loading the template",
}
# The phases of a fork's creation, as the API reports them, joined for the table's columns.
PHASES = {
    "queue": ["queue"],
    "fork": ["fork"],
    "vm": ["vm", "vcpus"],
    "restore": ["restore"],
    "enter": ["activate", "enter"],
    "guest": ["guest"],
    "reply": ["reply"],
    "total": ["total"],
}


class DemoError(Exception):
    """The demo did not do what it shows; the message says what is wrong."""


class Progress:
    """A bar that is redrawn, or, where that is not possible, a line for every stage."""

    def __init__(self, redraws: bool) -> None:
        self.redraws = redraws
        self.label, self.part, self.began = "", 0.0, time.monotonic()
        self.ended = threading.Event()
        if redraws:
            threading.Thread(target=self.tick, daemon=True).start()

    def stage(self, label: str) -> None:
        self.finish_stage()
        self.label, self.part, self.began = label, 0.0, time.monotonic()

    def advance(self, done: int, total: int) -> None:
        self.part = done / max(total, 1)

    def finish_stage(self) -> None:
        if self.label:
            start = "\r\033[K" if self.redraws else ""
            print(f"{start}{time.monotonic() - self.began:8.1f} s  {self.label}", flush=True)
        self.label = ""

    def tick(self) -> None:
        while not self.ended.wait(0.2):
            if label := self.label:
                filled = round(30 * self.part)
                bar = f"[{'#' * filled}{'.' * (30 - filled)}] " if self.part else ""
                print(f"\r\033[K{time.monotonic() - self.began:8.1f} s  {bar}{label}", end="", flush=True)


class Client(http.client.HTTPConnection):
    """A connection to forkd's Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("forkling", timeout=300)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))

    def call(self, method: str, path: str, body: object = None) -> object:
        self.request(method, path, json.dumps(body) if body is not None else None, {"content-type": "application/json"})
        response = self.getresponse()
        text = response.read()
        answer = json.loads(text) if text else None
        if response.status >= 400:
            raise DemoError(f"{method} {path}: {explain(answer['error'])}")
        return answer


def explain(error: dict) -> str:
    cause = f": {error['cause']}" if error.get("cause") else ""
    return f"{error['message']}{cause}\n  do: {error['remediation']}"


@contextlib.contextmanager
def daemon(folder: Path, state: Path = STATE) -> Iterator[Path]:
    """A forkd that ends with the block, and with this process should it be killed."""
    path = folder / "forkd.sock"
    log = folder / "forkd.log"
    command = [PROGRAMS / "forkd", "--socket", path, "--state-dir", state]
    with open(log, "wb") as stderr:
        process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *command], stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        for _ in range(300):
            if path.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        if not path.exists():
            raise DemoError("forkd did not start")
        yield path
    except BaseException:
        print("\nforkd's log ends with:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
        raise
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def template(client: Client, key: str, progress: Progress) -> bool:
    """Gets the template ready; builds it unless an earlier demo left one that was made of the same things (`key`)."""
    key_file = STATE / "key"
    if TEMPLATE in [known["name"] for known in client.call("GET", "/v1/templates")["templates"]]:
        if key_file.exists() and key_file.read_text().strip() == key:
            progress.stage("loading the template of an earlier demo")
            with contextlib.suppress(DemoError):
                client.call("POST", f"/v1/templates/{TEMPLATE}/reload")
                return False
        client.call("DELETE", f"/v1/templates/{TEMPLATE}")
    build(client.path, progress)
    key_file.write_text(key)
    return True


def keep(folder: Path) -> None:
    """Copies what the next demo in a new lab needs to start from this template; the root image it has already."""
    shutil.copytree(STATE / "templates" / TEMPLATE, folder / "templates" / TEMPLATE, ignore=shutil.ignore_patterns("root.erofs"))
    shutil.copy(STATE / "key", folder / "key")


def build(path: Path, progress: Progress) -> None:
    command = [PROGRAMS / "forkling", "--socket", path, "--json", "template", "build", "-f", HERE / "python.toml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as building:
        for line in building.stdout:
            event = json.loads(line)
            match event.get("event"):
                case "stage":
                    progress.stage(STAGES.get(event["stage"], event["stage"]))
                case "save":
                    progress.advance(event["done"], event["total"])
                case "error" | None:
                    raise DemoError(explain(event["error"]))


def available_kib() -> int:
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable:"))


def settled(read: Callable[[], int], slack: int) -> int:
    """What `read` returns once it no longer moves by more than `slack`: images are completed in the background, and ended processes
    give their memory back a little later."""
    last = read()
    for _ in range(60):
        time.sleep(0.5)
        now = read()
        if abs(now - last) <= slack:
            break
        last = now
    return now


def make_forks(client: Client, count: int, prefix: str) -> list[dict]:
    results = client.call("POST", "/v1/forks", {"template": TEMPLATE, "count": count, "name_prefix": prefix})
    failed = [result["error"] for result in results if "error" in result]
    if failed:
        raise DemoError(f"{len(failed)} of {count} forks were not made; the first: {explain(failed[0])}")
    return [result["fork"] for result in results]


def run_program(path: Path, fork: dict, n: int) -> dict:
    request = {"argv": ["python3", "-", str(n)], "stdin": (HERE / "program.py").read_text(), "timeout_ms": 120_000}
    with contextlib.closing(Client(path)) as client:
        try:
            answer = client.call("POST", f"/v1/forks/{fork['id']}/exec", request)
        except DemoError as error:
            console = client.call("GET", f"/v1/forks/{fork['id']}/console")["text"].splitlines()[-12:]
            raise DemoError("\n".join([str(error), "the guest's console ends with:", *console])) from None
    if answer.get("exit_code") != 0:
        raise DemoError(f"the program in fork {fork['id']} did not succeed: {answer}")
    random, hostname, prime = answer["stdout"].split()
    return {"n": n, "random": random, "hostname": hostname, "prime": int(prime), "exec_us": answer["timings_us"]["total"]}


def run_programs(path: Path, forks: list[dict], progress: Progress) -> list[dict]:
    progress.stage("a Python program in each")
    outputs: list[dict] = []
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for output in pool.map(lambda pair: run_program(path, pair[1], 10 * (pair[0] + 1)), enumerate(forks)):
            outputs.append(output)
            progress.advance(len(outputs), len(forks))
    return outputs


def check(outputs: list[dict]) -> None:
    for what in ("random", "hostname"):
        if len({output[what] for output in outputs}) != len(outputs):
            raise DemoError(f"two forks have the same {what}")
    limit = max(output["prime"] for output in outputs)
    primes = [n for n in range(2, limit + 1) if all(n % divisor for divisor in range(2, int(n**0.5) + 1))]
    for output in outputs:
        if primes[output["n"] - 1] != output["prime"]:
            raise DemoError(f"prime number {output['n']} is not {output['prime']}")


def show(forks: list[dict], outputs: list[dict]) -> None:
    header = ["id", "hostname", "random number", "n-th prime", *PHASES, "python"]
    rows = []
    for fork, output in zip(forks, outputs, strict=True):
        timings = [sum(fork["timings_us"][name] for name in names) for names in PHASES.values()]
        times = [f"{micros / 1000:.2f}" for micros in [*timings, output["exec_us"]]]
        rows.append([fork["id"], output["hostname"], output["random"], f"{output['n']}: {output['prime']}", *times])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{'':{sum(widths[:4]) + 6}}  milliseconds")
    for row in [header, *rows]:
        cells = [cell.ljust(width) if column < 3 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells))


def demo(folder: Path, arguments: argparse.Namespace, progress: Progress) -> None:
    progress.stage("starting forkd")
    with daemon(folder) as path, contextlib.closing(Client(path)) as client:
        built = template(client, arguments.key, progress)
        if built and arguments.keep:
            keep(arguments.keep)
        # Pages of the image that were never needed before are read once, for all forks; that is not the price of a fork.
        progress.stage("one fork, to have the template's memory complete")
        first = make_forks(client, 1, "warm-up")
        run_program(path, first[0], 10)
        client.call("DELETE", f"/v1/forks/{first[0]['id']}")
        resident = settled(lambda: client.call("GET", f"/v1/templates/{TEMPLATE}").get("resident_bytes", 0), 0) / 2**20
        before = settled(available_kib, 256)
        progress.stage(f"{FORKS} forks")
        began = time.monotonic()
        forks = make_forks(client, FORKS, "demo")
        took = time.monotonic() - began
        outputs = run_programs(path, forks, progress)
        progress.stage("looking at the memory")
        beyond = (before - settled(available_kib, 256)) / 1024
        progress.finish_stage()
        check(outputs)
        show(forks, outputs)
        if arguments.emulated:
            print("\nTimes are of an emulated CPU that all forks share; they say nothing of hardware.")
        print(f"\n{FORKS} forks in {took * 1000:.0f} ms, request to answer, each with its own random number and host name.")
        print(f"Memory they took beyond the template: {beyond:.1f} MiB, {beyond / FORKS:.2f} MiB a fork (MemAvailable, after each ran its program).")
        print(f"The template itself: {resident:.1f} MiB of image in memory, once for all.\n")
        progress.stage("ending the forks and forkd")
        client.call("DELETE", f"/v1/forks?template={TEMPLATE}")
    progress.finish_stage()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bars", action="store_true", default=sys.stdout.isatty(), help="redraw progress even where stdout is no terminal")
    parser.add_argument("--emulated", action="store_true", help="say that times are not those of hardware")
    parser.add_argument("--key", required=True, help="changes with what the template is made of")
    parser.add_argument("--keep", type=Path, help="folder for what saves the next demo the build")
    arguments = parser.parse_args()
    progress = Progress(arguments.bars)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    STATE.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="forkling-demo."))
    try:
        demo(folder, arguments, progress)
    except DemoError as error:
        progress.finish_stage()
        print(f"demo: {error}", file=sys.stderr)
        return 1
    finally:
        progress.ended.set()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
