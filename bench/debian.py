#!/usr/bin/env python3
"""What a fork of a Debian guest takes, on this machine's clock. `bench/run` runs it in the lab, whose clock counts instructions.

Prints a table, and the same as JSON to --json FILE. Every fork is asked for by a request of its own, acknowledged before the next,
and runs /bin/true twice; another fork lives on, since the first VM of a host pays for all.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))
import forks as demo  # noqa: E402

IDLE = 32


def one_fork(client: demo.Client) -> dict[str, float]:
    """Milliseconds from the request: to its answer, as this client sees it; to the first and of the second command's end."""
    began = time.monotonic()
    fork = demo.make_forks(client, 1, "bench")[0]
    made = time.monotonic()
    run = {"argv": ["/bin/true"]}
    if client.call("POST", f"/v1/forks/{fork['id']}/exec", run)["exit_code"] != 0:
        raise demo.DemoError("/bin/true failed")
    first = time.monotonic()
    client.call("POST", f"/v1/forks/{fork['id']}/exec", run)
    second = time.monotonic()
    client.call("DELETE", f"/v1/forks/{fork['id']}")
    # The end of a VM takes tens of milliseconds of the CPU that the next one needs.
    time.sleep(0.3)
    phases = {f"  {name}": micros / 1000 for name, micros in fork["timings_us"].items() if name != "total"}
    return {
        "request -> acknowledged (daemon's clock)": fork["timings_us"]["total"] / 1000,
        **phases,
        "request -> answer read": (made - began) * 1e3,
        "request -> first /bin/true returned": (first - began) * 1e3,
        "second /bin/true": (second - first) * 1e3,
    }


def idle_memory(client: demo.Client) -> float:
    """MiB a fork that did nothing but acknowledge takes, over IDLE of them."""
    before = demo.settled(demo.available_kib, 256)
    demo.make_forks(client, IDLE, "idle")
    return (before - demo.settled(demo.available_kib, 256)) / 1024 / IDLE


def measure(state: Path, runs: int) -> dict:
    progress = demo.Progress(redraws=False)
    with tempfile.TemporaryDirectory(prefix="forkling-bench.") as folder, demo.daemon(Path(folder), state) as path:
        with contextlib.closing(demo.Client(path)) as client:
            demo.build(path, progress)
            progress.finish_stage()
            demo.make_forks(client, 1, "companion")
            for _ in range(3):
                one_fork(client)
            demo.settled(lambda: client.call("GET", f"/v1/templates/{demo.TEMPLATE}").get("resident_bytes", 0), 0)
            samples = [one_fork(client) for _ in range(runs)]
            return {"samples": samples, "idle_mib": idle_memory(client)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forkling-state.") as state:
        result = measure(Path(state), arguments.runs)
    print(f"\nmilliseconds, {arguments.runs} forks                      min      p50      max")
    for name in result["samples"][0]:
        values = sorted(sample[name] for sample in result["samples"])
        print(f"{name:42} {values[0]:8.2f} {statistics.median(values):8.2f} {values[-1]:8.2f}")
    print(f"\nmemory of an idle fork, MemAvailable over {IDLE}: {result['idle_mib']:.2f} MiB")
    if arguments.json:
        arguments.json.write_text(json.dumps(result))


main()
